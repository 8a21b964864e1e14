"""The audit of a mechanism: play games against the real engine, then compare bounds and tests with what is stated.

Two stages, of two launches each, so that launches can be compared. In the first, every row is drawn in every step (q =
1): the game is a Gaussian one, and the sharpest on clipping and noise. In the second, rows are drawn with the run's own
q, which is tested by itself and in the games of one step and of several steps together.

Each of the questions may fail with an equal share of 1 - confidence, so all findings together are right with at least
that confidence, however often the mechanism is audited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dptune import accounting
from dptune._validate import refuse, require_count, require_delta, require_probability
from dptune.audit import checks
from dptune.audit.bounds import Bound, Guesses, epsilon_bound, epsilon_of_mu, likelihood_ratios, mu_bound
from dptune.audit.checks import Finding
from dptune.audit.games import Launch, Mechanism, play
from dptune.audit.stand_in import StandIn

_EPSILON = "epsilon, at least"
_Question = Callable[[float], list[Finding]]
_Player = Callable[..., Launch]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is played, and what is stated.

    Attributes:
        sampling_probability: q.
        delta: of all epsilons.
        steps: steps of each launch, at least 20; there are four launches, or two if q is 1.
        composed: steps of one game of several steps.
        confidence: with which all findings together are right.
    """

    sampling_probability: float
    delta: float
    steps: int = 250
    composed: int = 10
    confidence: float = 1 - 1e-4

    def __post_init__(self) -> None:
        require_probability("sampling_probability", self.sampling_probability)
        require_delta(self.delta)
        require_count("steps", self.steps, minimum=20)
        require_count("composed", self.composed)
        if self.composed > self.steps // 2:
            refuse("composed", self.composed, f"must be at most half of the {self.steps} steps of a launch")
        if not 0.5 <= self.confidence < 1:
            refuse("confidence", self.confidence, "give a number of at least 0.5 and below 1")


@dataclass(frozen=True)
class Result:
    """What an audit found.

    Attributes:
        findings: every bound and test; those that contradict what is stated come first.
        mu: a lower bound on 1 / sigma per contribution of a row, from the games at q = 1.
        games: how many games were played.
    """

    findings: tuple[Finding, ...]
    mu: float
    games: int

    @property
    def contradicted(self) -> bool:
        """Whether anything contradicts the stated epsilon."""
        return any(one.contradicted for one in self.findings)

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.contradicted:
            return "no contradiction"
        worst = next((one for one in self.findings if one.contradicted and one.measured == _EPSILON), self.findings[0])
        told = f"{worst.measured} {worst.found:.4g}, stated {worst.stated:.4g}"
        return f"CONTRADICTED: {told} ({worst.question})"


def audit_mechanism(mechanism: Mechanism, plan: Plan, player: _Player = play) -> Result:
    """Audit a mechanism. It takes about 10 ms per step and rank.

    Args:
        mechanism: what is audited.
        plan: how much is played.
        player: plays a launch, as `dptune.audit.games.play` does.
    """
    model = mechanism.stand_in()
    contributions, homes = model.contributions(), [model.home_of(unit) for unit in range(mechanism.units)]
    sizes = {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}
    stages = [(1.0, _launches(mechanism, model, plan, 1.0, 1, player))]
    if plan.sampling_probability < 1:
        q = plan.sampling_probability
        stages.append((q, _launches(mechanism, model, plan, q, plan.composed, player)))
    games = [_Games(mechanism, plan, contributions, q, launches) for q, launches in stages]
    questions: list[_Question] = [*games[0].gaussian(homes), *games[-1].sampled()]
    for stage in games:
        questions += stage.tests(homes, sizes)
    alpha = (1 - plan.confidence) / len(questions)
    findings = [finding for question in questions for finding in question(alpha)]
    ordered = sorted(findings, key=lambda one: not one.contradicted)
    mu = games[0].mu(alpha).value / mechanism.group_size
    return Result(tuple(ordered), mu, sum(stage.observed.size for stage in games))


def implied_epsilon(
    mu: float, *, sampling_probability: float, steps: int, delta: float, group_size: int = 1
) -> float | None:
    """The epsilon of a whole run whose steps protect no better than `Result.mu` shows; None if mu is 0.

    It holds if a step is a Gaussian release of a Poisson draw, which the other findings test.
    """
    if mu <= 0:
        return None
    return accounting.epsilon(
        noise_multiplier=1 / mu,
        sampling_probability=sampling_probability,
        steps=steps,
        delta=delta,
        group_size=group_size,
    )


def _launches(
    mechanism: Mechanism, model: StandIn, plan: Plan, q: float, block: int, player: _Player
) -> tuple[Launch, Launch]:
    ones, others = (player(mechanism, model, sampling_probability=q, steps=plan.steps, block=block) for _ in range(2))
    return ones, others


class _Games:
    """The launches of one stage, as the adversary and the tests see them."""

    def __init__(
        self, mechanism: Mechanism, plan: Plan, contributions: Tensor, q: float, launches: tuple[Launch, Launch]
    ) -> None:
        self._mechanism, self._plan, self._contributions = mechanism, plan, contributions
        self._q, self._launches = q, launches
        self._sigma = mechanism.config(q, plan.steps).gradient_noise_multiplier
        self.observed = np.concatenate([one.observed(contributions) for one in launches])
        self._coins = np.concatenate([one.coins for one in launches])
        self._counts = np.concatenate([one.counts() for one in launches])
        self._noise = [one.noise(contributions) / self._sigma for one in launches]

    def gaussian(self, homes: list[str]) -> list[_Question]:
        """The questions of games without sampling: for all units, and for those of each home layer."""
        parts = {"all units": np.full(len(homes), True)}
        parts |= {f"units mostly in {layer}": np.array(homes) == layer for layer in sorted(set(homes))}
        stated = self._stated(1)

        def ask(name: str, own: np.ndarray) -> _Question:
            def question(alpha: float) -> list[Finding]:
                bound = self._bound(self._scores()[:, own], self._coins[:, own], alpha / 2)
                mu = self.mu(alpha / 2, own)
                by_mu = Bound(epsilon_of_mu(mu.value, self._plan.delta), mu.games)
                what = f"one step in which every row is drawn, {name}"
                return [_epsilon(what, bound, stated), _epsilon(f"{what}, as a Gaussian", by_mu, stated)]

            return question

        return [ask(name, own) for name, own in parts.items()]

    def sampled(self) -> list[_Question]:
        """The questions of games with the run's own q: one step, and several together."""
        if self._q == 1:
            return []
        composed = self._plan.composed

        def one_step(alpha: float) -> list[Finding]:
            bound = self._bound(self._scores(), self._coins, alpha)
            return [_epsilon(f"one step with q = {self._q:g}", bound, self._stated(1))]

        def several(alpha: float) -> list[Finding]:
            scores, coins = self._composed(composed)
            bound = self._bound(scores, coins, alpha)
            return [_epsilon(f"{composed} steps with q = {self._q:g}", bound, self._stated(composed))]

        return [one_step, several] if composed > 1 else [one_step]

    def tests(self, homes: list[str], sizes: Mapping[str, int]) -> list[_Question]:
        """The questions about noise, contributions and draws."""
        ones, others = self._noise
        both = torch.cat([ones, others])
        counted = self._counts * self._coins
        drawn = [one.owners >= 0 for one in self._launches]
        even, odd = both[0 : 2 * (len(both) // 2) : 2], both[1::2]
        questions: list[_Question] = [
            lambda alpha: checks.noise_everywhere(both, alpha),
            lambda alpha: [checks.noise_of_tensors(both, dict(sizes), alpha)],
            lambda alpha: [checks.noise_of_pairs("noise shared by neighbouring steps", even, odd, alpha)],
            lambda alpha: [checks.noise_of_pairs("noise shared by two launches", ones, others, alpha)],
            lambda alpha: [checks.correlated_coordinates(both, alpha)],
            lambda alpha: checks.contributions(self.observed, counted, homes, self._sigma, alpha),
            lambda alpha: checks.draws(np.concatenate(drawn), self._q, alpha),
            lambda alpha: checks.same_draws(drawn[0], drawn[1], self._q, alpha),
        ]
        if self._launches[0].shares is not None:
            questions.append(lambda alpha: [self._ranks(alpha)])
        return [self._named(question) for question in questions]

    def mu(self, alpha: float, own: np.ndarray | None = None) -> Bound:
        """A lower bound on mu of the units `own`."""
        seen, coins = (part if own is None else part[:, own] for part in (self.observed, self._coins))
        return mu_bound(*_halves(seen, coins), alpha=alpha)

    def _named(self, question: _Question) -> _Question:
        """The same question, whose findings tell the stage."""
        stage = "every row drawn" if self._q == 1 else f"q = {self._q:g}"
        return lambda alpha: [replace(one, question=f"{one.question} ({stage})") for one in question(alpha)]

    def _ranks(self, alpha: float) -> Finding:
        """Whether two ranks share noise."""
        scale = self._sigma / math.sqrt(self._mechanism.ranks)
        ones, others = (
            torch.cat([one.noise(self._contributions, rank) / scale for one in self._launches]) for rank in (0, 1)
        )
        return checks.noise_of_pairs("noise shared by two ranks, or too little on each", ones, others, alpha)

    def _scores(self) -> np.ndarray:
        return likelihood_ratios(
            self.observed,
            noise_multiplier=self._sigma,
            sampling_probability=self._q,
            group_size=self._mechanism.group_size,
        )

    def _composed(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, coins) of games of so many steps; what is left at the end of a launch is not used."""
        whole = self._plan.steps // steps * steps
        scores, coins = (part.reshape(2, self._plan.steps, -1)[:, :whole] for part in (self._scores(), self._coins))
        summed = scores.reshape(2 * (whole // steps), steps, -1).sum(1)
        return summed, coins.reshape(2 * (whole // steps), steps, -1)[:, 0]

    def _bound(self, scores: np.ndarray, coins: np.ndarray, alpha: float) -> Bound:
        return epsilon_bound(*_halves(scores, coins), delta=self._plan.delta, alpha=alpha)

    def _stated(self, steps: int) -> float:
        return accounting.epsilon(
            noise_multiplier=self._mechanism.noise_multiplier,
            sampling_probability=self._q,
            steps=steps,
            delta=self._plan.delta,
            group_size=self._mechanism.group_size,
        )


def _halves(scores: np.ndarray, coins: np.ndarray) -> tuple[Guesses, Guesses]:
    """The games of the first launch, which choose, and those of the second, which judge."""
    middle = len(scores) // 2
    halves = [Guesses(scores[part].ravel(), coins[part].ravel()) for part in (slice(middle), slice(middle, None))]
    return halves[0], halves[1]


def _epsilon(question: str, bound: Bound, stated: float) -> Finding:
    return Finding(question, bound.value, stated, bound.value > stated, _EPSILON, bound.games)
