"""What is accounted for. No torch in this file."""

from __future__ import annotations

from typing import NamedTuple

from dptune.accounting.truncation import Cut


class Spend(NamedTuple):
    """`steps` releases of a Poisson-subsampled Gaussian mechanism with the same settings.

    Attributes:
        noise_multiplier: standard deviation of the noise, divided by the norm to which each example is clipped.
        sampling_probability: probability of each example, per step.
        steps: number of releases.
        group_size: maximum number of examples of one privacy unit. An example is whatever is sampled and clipped as
            one. If that is everything that an author contributes to a step, the group size is 1.
        cut: the limit on the number of examples in a draw; None for plain Poisson draws.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    group_size: int = 1
    cut: Cut | None = None

    def with_bands(self, bands: int) -> Spend:
        """What the same steps cost as one launch with noise bands, see `dptune.correlated_noise`.

        `sampling_probability` is then each example's chance in a step before anyone knows its group. In the steps of
        its group it is `bands` times as large. A launch of T steps has at most T / `bands` of these, rounded up.
        """
        if bands == 1:
            return self
        turns = -(-self.steps // bands)
        return self._replace(sampling_probability=bands * self.sampling_probability, steps=turns)

    @property
    def full_probability(self) -> float:
        """An upper bound on the probability that one more example finds no room in a batch; 0 without a cut."""
        return 0.0 if self.cut is None else self.cut.full_probability(self.sampling_probability)

    @property
    def once_and_twice(self) -> tuple[Spend, Spend]:
        """The same without a cut: with the sensitivity of one example, and with twice that."""
        plain = self._replace(cut=None)
        return plain, plain._replace(noise_multiplier=self.noise_multiplier / 2)

    @property
    def reach(self) -> int:
        """By how many clip norms a unit can move one step's sum, at most."""
        return self.group_size if self.cut is None else 2
