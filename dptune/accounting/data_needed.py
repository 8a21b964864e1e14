"""How much data an epsilon takes: the noise with more or fewer examples, and how many keep the noise small.

Batch and steps stay the same, and with them the training's time. More examples then mean a smaller sampling
probability, and so less noise for the same epsilon. What to compare it with: a step adds up the gradients of a batch,
each at most as long as the clip norm C, and noise of sigma C in every direction. At sigma = 1 the noise is, in every
direction, as large as the most that one example can add. No number of examples makes a model
good; it only makes the noise small.

Searches are rough: they state up to 5% more noise, or more examples, than are needed, never less.

No torch in this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dptune._validate import InvalidArgument, require_count, require_positive
from dptune.accounting import Cut, Spend, compose, noise_multiplier, search_grid
from dptune.accounting.rounding import rounded_up_to_figures

USUAL_EPSILONS = (1.0, 3.0, 8.0)
SMALL_NOISE = 1.0

_SCALES = (0.1, 1, 10)  # of the number of examples
_PRECISE = 1.02  # the number of examples is known so well
_MOST = 10**12  # examples, more than there are
_FIGURES = 2


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a training does, whatever the number of examples.

    Attributes:
        batch: the expected batch size.
        steps: the number of steps.
        delta: the probability with which the bound may fail. For n examples a tenth of 1/n, if that is less.
        group_size: see `dptune.accounting.Spend`.
        max_batch: the limit on the number of examples in a draw; None without one.
        noise_bands: see `dptune.mechanism.PrivacyConfig`; fewer where so many would draw examples more than always.

    Raises:
        InvalidArgument: a value outside its range.
    """

    batch: float
    steps: int
    delta: float
    group_size: int = 1
    max_batch: int | None = None
    noise_bands: int = 1

    def __post_init__(self) -> None:
        require_positive("batch", self.batch)
        require_count("steps", self.steps)

    def delta_of(self, num_examples: float) -> float:
        """The delta for so many examples."""
        return min(self.delta, 0.1 / num_examples)

    def cut_of(self, num_examples: int) -> Cut | None:
        """The limit on draws from so many examples."""
        return None if self.max_batch is None else Cut(self.max_batch, num_examples)

    def spend(self, sigma: float, num_examples: float) -> Spend:
        """What the training costs with so many examples."""
        q, cut = min(1.0, self.batch / num_examples), self.cut_of(math.ceil(num_examples))
        return Spend(sigma, q, self.steps, self.group_size, cut).with_bands(min(self.noise_bands, max(1, int(1 / q))))

    def noise(self, num_examples: int, target_epsilon: float) -> float | None:
        """The noise multiplier that so many examples need for an epsilon; None if no useful noise reaches it."""
        spend = self.spend(1.0, num_examples)
        return noise_if_any(
            target_epsilon=target_epsilon,
            delta=self.delta_of(num_examples),
            sampling_probability=spend.sampling_probability,
            steps=spend.steps,
            group_size=spend.group_size,
            cut=spend.cut,
            rough=True,
        )

    def examples(self, target_epsilon: float, sigma: float = SMALL_NOISE) -> int | None:
        """How many examples reach an epsilon with a noise multiplier of at most `sigma`; None for more than 10^12."""
        grid = search_grid(target_epsilon, self.steps)

        def reaches(number: float) -> bool:
            spend = self.spend(sigma, number)
            return compose([spend], delta=self.delta_of(number), interval=grid) <= target_epsilon

        few, enough = self.batch, self.batch
        while not reaches(enough):
            few, enough = enough, 4 * enough
            if enough > _MOST:
                return None
        while enough > _PRECISE * few:
            middle = math.sqrt(few * enough)
            few, enough = (few, middle) if reaches(middle) else (middle, enough)
        return math.ceil(enough)


def noise_if_any(
    *,
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    group_size: int = 1,
    cut: Cut | None = None,
    rough: bool = False,
) -> float | None:
    """`dptune.accounting.noise_multiplier`, or None for a target that no useful noise reaches."""
    try:
        return noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            sampling_probability=sampling_probability,
            steps=steps,
            group_size=group_size,
            cut=cut,
            rough=rough,
        )
    except InvalidArgument as error:
        if error.name != "target_epsilon":
            raise
        return None


def describe_data_needed(
    work: Work, num_examples: int, targets: Sequence[float], sampled: str = "examples"
) -> list[str]:
    """A table of the noise for a tenth of the examples, all and ten times as many, and how many keep it small.

    Args:
        work: the batch and the steps.
        num_examples: how many there are; amounts below the batch are left out.
        targets: the epsilons, one column each.
        sampled: what is counted.
    """
    amounts = [round(scale * num_examples) for scale in _SCALES if scale * num_examples >= work.batch]
    head = [sampled, *(f"epsilon {target:g}" for target in targets)]
    grid = [head, *([f"{n:,}", *(_shown(work.noise(n, target)) for target in targets)] for n in amounts)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    rows = ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in grid]
    needed = ", ".join(f"{_number(work.examples(target))} for epsilon {target:g}" for target in targets)
    title = f"noise multiplier without noise bands, for more or fewer {sampled}, this batch and these steps"
    return [
        f"how much data          {title}",
        *(f"{'':<23}{row}" for row in rows),
        f"{f'{sampled} for noise {SMALL_NOISE:g}':<23}{needed}",
        f"{'':<23}(noise {SMALL_NOISE:g}: in every direction as much as one of the {sampled} can add)",
    ]


def _shown(sigma: float | None) -> str:
    return "-" if sigma is None else rounded_up_to_figures(sigma, _FIGURES)


def _number(value: int | None) -> str:
    return "too many" if value is None else f"{float(rounded_up_to_figures(value, _FIGURES)):,.0f}"
