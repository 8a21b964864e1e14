"""Private selection: the best of a random number of private trainings costs little more than one.

Choosing hyper-parameters by what private runs score is one more look at the data: the best of m runs costs what all m
cost together. Papernot and Steinke 2022 ("Hyperparameter Tuning with Renyi Differential Privacy", arXiv 2110.03620)
draw the number of trials K from a Poisson or a geometric distribution; each trial picks a candidate at random, trains
it and scores it; the best one's candidate, model and score are released, and nothing else ever is. Their bounds are
dp-accounting's `RepeatAndSelectDpEvent`, in Renyi accounting.

What one trial is. A record is for training or for validation, never for both, and adding or removing one
- for training changes the trial's noisy steps, and the score only through the model that they release;
- for validation changes no model, and the number of right answers by 1 at most; the score is that number plus Gaussian
  noise of `validation_noise` records.
So the whole costs the larger of two selections: one of trainings, one of Gaussian releases. The bound is void if
- a score has no noise (or another one) and the validation records are private;
- K, the order of the trials, or anything of a loser is published: models, scores, logs, how long it all took;
- K is cut off because it is inconvenient, or drawn again because it was 0.

No torch in this file. As in `dptune.accounting`, functions import dp-accounting and scipy when they compute.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from dptune._validate import refuse, require_count, require_delta, require_positive, require_probability
from dptune.accounting import SIGMA_RANGE, Spend, compose, round_up
from dptune.accounting.rounding import rounded_up
from dptune.keystream import Keystream

if TYPE_CHECKING:
    from dp_accounting import DpEvent

SELECTION_ACCOUNTANT = "RDP (dp-accounting)"
POISSON, GEOMETRIC = "poisson", "geometric"
DISTRIBUTIONS = (POISSON, GEOMETRIC)

# dp-accounting's names for them: the truncated negative binomial's shape, of which the Poisson is the limit.
_SHAPES = {POISSON: math.inf, GEOMETRIC: 1.0}
_NOTHING = 1e-12  # stands for an epsilon of 0, which much noise has at a large delta
_SMALLEST_UNIFORM = 2.0**-54  # stands for 0, where quantile functions are infinite


class DrawnTrial(NamedTuple):
    """One trial of a selection, before it runs. Secret, as is how many there are.

    Attributes:
        candidate: which of the candidates to train, from 0.
        score_noise: what is added to its number of right answers, in records.
    """

    candidate: int
    score_noise: float


class SelectionCost(NamedTuple):
    """Epsilon of ways to publish a model, for the records trained on.

    Attributes:
        one_run: one training with settings that were fixed without a look at the data.
        selection: the winner of a private selection (for whoever is worse off, a record of training or of validation).
        best_of: the best of `runs` trainings as they are usually reported, by composition; what their scores tell about
            validation records is not bounded by any epsilon.
        runs: how many.
    """

    one_run: float
    selection: float
    best_of: float
    runs: int


@dataclass(frozen=True)
class PrivateSelection:
    """How many trials a selection has on average, and how noisy its scores are.

    Attributes:
        distribution: of the number of trials: "poisson" (cheaper, but may be 0, and then nothing is released) or
            "geometric" (at least 1).
        mean_trials: its mean, at least 1.
        validation_noise: standard deviation of the noise on the number of right answers, in records.

    Raises:
        InvalidArgument: a value outside its range. Scores without noise are refused: no epsilon would cover the
            validation records.
    """

    distribution: str
    mean_trials: float
    validation_noise: float

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            refuse("distribution", self.distribution, f"give one of {', '.join(DISTRIBUTIONS)}")
        if not (math.isfinite(self.mean_trials) and self.mean_trials >= 1):
            refuse("mean_trials", self.mean_trials, "give a finite number of at least 1")
        require_positive("validation_noise", self.validation_noise)

    def draw_trials(self, num_candidates: int, keystream: Keystream | None = None) -> list[DrawnTrial]:
        """Draw how many trials there are, their candidates (uniform, independent) and the noise of their scores.

        Run all of them, whatever their number; none at all is an outcome as well: then nothing is released, and the
        budget is spent. All of it is drawn before anything runs, so that it cannot depend on the data.

        Args:
            num_candidates: to pick from.
            keystream: for tests alone; by default a fresh one of the operating system's. No seed reaches it.
        """
        from scipy.special import ndtri

        require_count("num_candidates", num_candidates)
        stream = keystream or Keystream.from_os()
        (uniform,) = _inside(stream.uniforms(1))
        count = self._number_of(uniform)
        candidates = (int(value * num_candidates) for value in stream.uniforms(count))
        noises = (self.validation_noise * float(ndtri(value)) for value in _inside(stream.uniforms(count)))
        return [DrawnTrial(candidate, noise) for candidate, noise in zip(candidates, noises, strict=True)]

    @property
    def chance_of_nothing(self) -> float:
        """How likely it is that there is no trial at all."""
        return math.exp(-self.mean_trials) if self.distribution == POISSON else 0.0

    def _number_of(self, uniform: float) -> int:
        """How many trials a uniform value in (0, 1) stands for."""
        if self.distribution == POISSON:
            from scipy.stats import poisson

            return int(poisson.ppf(uniform, self.mean_trials))
        # Each trial is the last with a chance of 1 / mean, so more than k trials have one of (1 - 1 / mean)^k.
        return 1 if self.mean_trials == 1 else 1 + int(math.log(uniform) / math.log1p(-1 / self.mean_trials))

    def epsilon(self, spend: Spend, delta: float) -> float:
        """Epsilon of releasing the winner, where each trial's training is `spend`: for a record of the training set
        or of the validation set, whichever is larger.

        Raises:
            InvalidArgument: a setting outside its range; a group size above 1, which Renyi accounting cannot do.
        """
        return max(self.training_epsilon(spend, delta), self.validation_epsilon(delta))

    def training_epsilon(self, spend: Spend, delta: float) -> float:
        """Epsilon for a record that is trained on."""
        require_positive("noise_multiplier", spend.noise_multiplier)
        require_probability("sampling_probability", spend.sampling_probability)
        require_count("steps", spend.steps)
        if spend.group_size != 1:
            refuse("group_size", spend.group_size, "private selection accounts for single examples only; give 1")
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

        step = PoissonSampledDpEvent(spend.sampling_probability, GaussianDpEvent(spend.noise_multiplier))
        return self._epsilon_of(SelfComposedDpEvent(step, spend.steps), delta)

    def validation_epsilon(self, delta: float) -> float:
        """Epsilon for a record that scores are computed on: it moves a number of right answers by 1."""
        from dp_accounting import GaussianDpEvent

        return self._epsilon_of(GaussianDpEvent(self.validation_noise), delta)

    def _epsilon_of(self, trial: DpEvent, delta: float) -> float:
        from dp_accounting.dp_event import RepeatAndSelectDpEvent

        require_delta(delta)
        return _epsilon_of(RepeatAndSelectDpEvent(trial, self.mean_trials, _SHAPES[self.distribution]), delta)

    def noise_multiplier(
        self, *, target_epsilon: float, delta: float, sampling_probability: float, steps: int
    ) -> float:
        """The smallest noise multiplier (to four digits, rounded up) of each trial with which the whole selection
        costs at most `target_epsilon`.

        Raises:
            InvalidArgument: a setting outside its range, or a target that is out of reach.
        """
        require_positive("target_epsilon", target_epsilon)
        if (scores := self.validation_epsilon(delta)) > target_epsilon:
            costs = f"epsilon {rounded_up(scores)}, more than {rounded_up(target_epsilon, trim=True)}"
            refuse("validation_noise", self.validation_noise, f"the scores alone cost {costs}; raise it")

        def spent(sigma: float) -> float:
            return self.training_epsilon(Spend(sigma, sampling_probability, steps), delta)

        smallest, largest = SIGMA_RANGE
        if spent(largest) > target_epsilon:
            refuse("target_epsilon", target_epsilon, "out of reach: lower mean_trials, or take fewer steps")
        if spent(smallest) <= target_epsilon:
            refuse("target_epsilon", target_epsilon, "out of reach: so large that it would protect nobody")
        from scipy.optimize import brentq

        found = brentq(
            lambda log_sigma: math.log(max(spent(math.exp(log_sigma)), _NOTHING) / target_epsilon),
            math.log(smallest),
            math.log(largest),
            xtol=2e-5,
        )
        sigma = round_up(math.exp(found))
        while spent(sigma) > target_epsilon:
            sigma = round_up(sigma * (1 + 2e-5))
        return sigma

    def cost(self, spend: Spend, delta: float, runs: int | None = None) -> SelectionCost:
        """What the selection costs, beside one run and beside the best of `runs` (by default its mean number)."""
        runs = math.ceil(self.mean_trials) if runs is None else runs
        require_count("runs", runs)
        together = spend._replace(steps=runs * spend.steps)
        return SelectionCost(
            compose([spend], delta=delta), self.epsilon(spend, delta), compose([together], delta=delta), runs
        )


def best_of(scores: Sequence[float], trials: Sequence[DrawnTrial]) -> tuple[int, float] | None:
    """The trial that wins, from 0, and its noisy score; None where there are no trials.

    Args:
        scores: of each trial the number of right answers, from 0 to all validation records.
        trials: as they were drawn, in the same order.
    """
    noisy = [score + trial.score_noise for score, trial in zip(scores, trials, strict=True)]
    if not noisy:
        return None
    winner = max(range(len(noisy)), key=noisy.__getitem__)
    return winner, noisy[winner]


@lru_cache(maxsize=256)
def _epsilon_of(event: DpEvent, delta: float) -> float:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    # Little noise makes a series for the lowest orders diverge. Each such order is left out with a warning, one a
    # question; leaving orders out can only raise the bound.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        accountant.compose(event)
        return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(level)


def _inside(uniforms: Iterable[float]) -> list[float]:
    """Uniforms of [0, 1) with 0 replaced: quantiles are infinite there."""
    return [max(float(value), _SMALLEST_UNIFORM) for value in uniforms]
