"""Private selection: the best of a random number of private trainings costs little more than one training.

Choosing hyper-parameters by the scores of private runs uses the data once more: the best of m runs costs as much as all
m together. Papernot and Steinke 2022 ("Hyperparameter Tuning with Renyi Differential Privacy", arXiv 2110.03620) draw
the number of trials K from a Poisson or a geometric distribution. Each trial picks a candidate at random, trains it and
scores it. Only the best trial is released: its candidate, model and score. dp-accounting's `RepeatAndSelectDpEvent`
computes the bound, in Renyi accounting.

Each record is used for training or for validation, never for both. Adding or removing one record
- for training changes the trial's noisy steps, and the score only through the model that they release;
- for validation changes no model, and the number of right answers by at most 1; the score is that number plus Gaussian
  noise with a standard deviation of `validation_noise` records.
So the total cost is the larger of two selections: one of trainings, one of Gaussian releases. The bound is void if
- a score has no noise, or other noise, and the validation records are private;
- K, the order of the trials or anything about a loser is published: models, scores, logs, running times;
- fewer than K trials run, or K is drawn again because it was 0.

No torch in this file. As in `dptune.accounting`, functions import dp-accounting and scipy only when they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from dptune._validate import refuse, require_count, require_delta, require_positive, require_probability
from dptune.accounting import RENYI_ACCOUNTANT, SIGMA_RANGE, Spend, compose, round_up
from dptune.accounting.rounding import rounded_up
from dptune.keystream import Keystream

if TYPE_CHECKING:
    from dp_accounting import DpEvent

SELECTION_ACCOUNTANT = RENYI_ACCOUNTANT
POISSON, GEOMETRIC = "poisson", "geometric"
DISTRIBUTIONS = (POISSON, GEOMETRIC)

# dp-accounting knows them as shapes of the truncated negative binomial; the Poisson distribution is its limit.
_SHAPES = {POISSON: math.inf, GEOMETRIC: 1.0}
_NOTHING = 1e-12  # replaces an epsilon of 0, which occurs with much noise and a large delta
_SMALLEST_UNIFORM = 2.0**-54  # replaces 0, where quantile functions are infinite


class DrawnTrial(NamedTuple):
    """One trial of a selection, before it runs. Secret, like the number of trials.

    Attributes:
        candidate: number of the candidate to train, from 0.
        score_noise: the noise to add to its number of right answers, in records.
    """

    candidate: int
    score_noise: float


class SelectionCost(NamedTuple):
    """The epsilon of several ways to publish a model.

    Attributes:
        one_run: one training with settings that were fixed without looking at the data.
        selection: the winner of a private selection, for training and validation records, whichever is larger.
        best_of: the best of `runs` trainings, by composition, for training records. No epsilon bounds what the scores
            reveal about validation records.
        runs: the number of trainings in `best_of`.
    """

    one_run: float
    selection: float
    best_of: float
    runs: int


@dataclass(frozen=True)
class PrivateSelection:
    """The number of trials that a selection has on average, and the noise of its scores.

    Attributes:
        distribution: distribution of the number of trials: "geometric" (at least 1) or "poisson" (cheaper, but it can
            be 0, and then nothing is released).
        mean_trials: mean of that distribution, at least 1.
        validation_noise: standard deviation of the noise on the number of right answers, in records; above 0.

    Raises:
        InvalidArgument: a value outside its range. Scores without noise are refused, because no epsilon would cover
            the validation records.
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
        """Draw the number of trials, their candidates (uniform, independent) and the noise of their scores.

        Run all of them, whatever their number. If there are none, nothing is released, but the budget is spent.
        Everything is drawn before anything runs, so that it cannot depend on the data.

        Args:
            num_candidates: number of candidates to choose from.
            keystream: for tests only; by default a new one, keyed from the operating system.
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
        """The probability that there is no trial at all."""
        return math.exp(-self.mean_trials) if self.distribution == POISSON else 0.0

    def _number_of(self, uniform: float) -> int:
        """The number of trials for a uniform value in (0, 1)."""
        if self.distribution == POISSON:
            from scipy.stats import poisson

            return int(poisson.ppf(uniform, self.mean_trials))
        # Each trial is the last with probability 1 / mean, so P(more than k trials) = (1 - 1 / mean)^k.
        return 1 if self.mean_trials == 1 else 1 + int(math.log(uniform) / math.log1p(-1 / self.mean_trials))

    def epsilon(self, spend: Spend, delta: float) -> float:
        """Epsilon of releasing the winner: for a training or a validation record, whichever is larger.

        Args:
            spend: the training of each trial.
            delta: the probability with which the bound may fail.

        Raises:
            InvalidArgument: a setting outside its range, or a group size above 1 or cut draws, which this accounting
                cannot handle.
        """
        return max(self.training_epsilon(spend, delta), self.validation_epsilon(delta))

    def training_epsilon(self, spend: Spend, delta: float) -> float:
        """Epsilon for a training record; see `epsilon`."""
        require_positive("noise_multiplier", spend.noise_multiplier)
        require_probability("sampling_probability", spend.sampling_probability)
        require_count("steps", spend.steps)
        if spend.group_size != 1:
            refuse("group_size", spend.group_size, "private selection accounts for single examples only; give 1")
        if spend.cut is not None:
            refuse("max_batch", spend.cut.max_batch, "private selection accounts for plain Poisson draws; leave it out")
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

        step = PoissonSampledDpEvent(spend.sampling_probability, GaussianDpEvent(spend.noise_multiplier))
        return self._epsilon_of(SelfComposedDpEvent(step, spend.steps), delta, spend.steps)

    def validation_epsilon(self, delta: float) -> float:
        """Epsilon for a validation record, which changes the number of right answers by at most 1."""
        from dp_accounting import GaussianDpEvent

        return self._epsilon_of(GaussianDpEvent(self.validation_noise), delta)

    def _epsilon_of(self, trial: DpEvent, delta: float, steps: int = 1) -> float:
        from dp_accounting.dp_event import RepeatAndSelectDpEvent

        require_delta(delta)
        return _epsilon_of(RepeatAndSelectDpEvent(trial, self.mean_trials, _SHAPES[self.distribution]), delta, steps)

    def noise_multiplier(
        self, *, target_epsilon: float, delta: float, sampling_probability: float, steps: int
    ) -> float:
        """The smallest noise multiplier per trial (rounded up to four decimals) that keeps the selection's epsilon at
        or below `target_epsilon`.

        Raises:
            InvalidArgument: a setting outside its range, or a target that no useful noise reaches.
        """
        require_positive("target_epsilon", target_epsilon)
        if (scores := self.validation_epsilon(delta)) > target_epsilon:
            costs = f"epsilon {rounded_up(scores)}, more than {rounded_up(target_epsilon, trim=True)}"
            refuse("validation_noise", self.validation_noise, f"the scores alone cost {costs}; raise it")

        def spent(sigma: float) -> float:
            return self.training_epsilon(Spend(sigma, sampling_probability, steps), delta)

        smallest, largest = SIGMA_RANGE
        if spent(largest) > target_epsilon:
            refuse("target_epsilon", target_epsilon, "out of reach: lower mean_trials, or use fewer steps")
        if spent(smallest) <= target_epsilon:
            refuse("target_epsilon", target_epsilon, "out of reach: so large that it protects nobody; lower it")
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
        """The epsilon of the selection, compared with one run and the best of `runs` (by default its mean number)."""
        runs = math.ceil(self.mean_trials) if runs is None else runs
        require_count("runs", runs)
        together = spend._replace(steps=runs * spend.steps)
        return SelectionCost(
            compose([spend], delta=delta), self.epsilon(spend, delta), compose([together], delta=delta), runs
        )


def best_of(scores: Sequence[float], trials: Sequence[DrawnTrial]) -> tuple[int, float] | None:
    """(number of the winning trial from 0, its noisy score); None if there are no trials.

    Args:
        scores: number of right answers of each trial.
        trials: the trials as they were drawn, in the same order.
    """
    noisy = [score + trial.score_noise for score, trial in zip(scores, trials, strict=True)]
    if not noisy:
        return None
    winner = max(range(len(noisy)), key=noisy.__getitem__)
    return winner, noisy[winner]


@lru_cache(maxsize=256)
def _epsilon_of(event: DpEvent, delta: float, steps: int) -> float:
    from dptune.accounting.bounds import renyi_epsilon_of

    return renyi_epsilon_of(event, delta, steps=steps)


def _inside(uniforms: Iterable[float]) -> list[float]:
    """Uniform values of [0, 1) with 0 replaced, because quantiles are infinite there."""
    return [max(float(value), _SMALLEST_UNIFORM) for value in uniforms]
