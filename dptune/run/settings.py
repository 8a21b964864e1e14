"""The privacy settings of a run, before its data are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from dptune import accounting
from dptune._validate import present, refuse, require_count, require_delta, require_positive
from dptune.accounting import Cut
from dptune.bands import MOST_BANDS
from dptune.clipping_styles import FLAT, Clipping

AUTO: Final = "auto"  # as many noise bands as make the least noise


def noise_bands_of(given: str | int) -> int | Literal["auto"]:
    """The noise bands that a flag names.

    Raises:
        InvalidArgument: it is neither a whole number from 1 nor "auto".
    """
    if given == AUTO:
        return AUTO
    if not str(given).isdecimal() or int(given) < 1:
        refuse("noise_bands", given, f'give a whole number of at least 1, or "{AUTO}"')
    return int(given)


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """The user's settings that decide epsilon, in addition to the data set, the expected batch size and the steps.

    Attributes:
        clip_norm: C, the maximum gradient norm per example (or per author). Ignored if per-layer clip norms are given.
        noise_multiplier: sigma; None to find it from `target_epsilon`.
        target_epsilon: the maximum epsilon; None if `noise_multiplier` is given.
        delta: the probability with which the bound may fail; None for `default_delta` of the number of examples.
        clipping: the clipping style.
        register: file with a limit on all that is released from these data (`dptune.budget`); None for no limit.
        noise_bands: see `PrivacyConfig`; or "auto" for the number that makes the least noise at the target epsilon.
        most_noise_bands: the largest number that "auto" may choose, see `dptune.bands.bands_within`.

    Raises:
        InvalidArgument: both or neither of the noise multiplier and the target epsilon, a value outside its range, or
            automatic noise bands without a target.
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    clipping: Clipping = FLAT
    register: str | None = None
    noise_bands: int | Literal["auto"] = 1
    most_noise_bands: int = MOST_BANDS

    def __post_init__(self) -> None:
        if self.noise_multiplier is None and self.target_epsilon is None:
            refuse("noise_multiplier", None, "give exactly one of the noise multiplier and the target epsilon")
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            refuse("target_epsilon", self.target_epsilon, "give it or the noise multiplier, not both")
        require_positive("clip_norm", self.clip_norm)
        for name, value in (("noise_multiplier", self.noise_multiplier), ("target_epsilon", self.target_epsilon)):
            if value is not None:
                require_positive(name, value)
        if self.delta is not None:
            require_delta(self.delta)
        require_count("most_noise_bands", self.most_noise_bands)
        if self.noise_bands != AUTO:
            require_count("noise_bands", self.noise_bands)
        elif self.target_epsilon is None:
            refuse("noise_bands", AUTO, "is chosen for a target epsilon; give that, or a number of bands")

    def sigma(self, *, sampling_probability: float, steps: int, group_size: int, cut: Cut | None = None) -> float:
        """The noise multiplier: the given one, or the smallest that keeps epsilon at or below the target.

        For the arguments see `Spend`.
        """
        if self.target_epsilon is None:
            return self.noise_multiplier or refuse("noise_multiplier", self.noise_multiplier, "give a number above 0")
        return accounting.noise_multiplier(
            target_epsilon=self.target_epsilon,
            delta=present(self.delta, "delta"),
            sampling_probability=sampling_probability,
            steps=steps,
            group_size=group_size,
            cut=cut,
        )
