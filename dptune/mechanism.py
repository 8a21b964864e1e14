"""The only place that combines sampling probability, noise multiplier, clip norm and divisor.

A step releases (sum over a Poisson draw of clipped per-example gradients + N(0, (sigma C)^2)) / expected batch size.
The noise is 0.2% larger than that, for rounding (`ROUNDING`). The draw may be cut at a maximal batch. Then the divisor
is still the batch size expected before the cut, q times the number of examples: a constant.

The noise may be correlated over steps (`dptune.correlated_noise`). Draws are then cyclic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, sqrt

from dptune import accounting
from dptune._validate import Described, refuse, require_count, require_delta, require_positive, require_within
from dptune.accounting import Cut, Spend, require_no_groups
from dptune.bands import Bands, best_bands, require_noise_bands
from dptune.clipping_styles import CLIP_NORMS, FLAT, Adaptive, Clipping, PerLayer
from dptune.grid import grid_of
from dptune.sampling import Parts, PoissonSampler, require_no_parts, require_plain_draws

# By how much rounding may raise the sensitivity above C, as a share of C. A row's own gradient is rounded by its own
# micro-batch, which nobody else changes (`dptune.shapes`). A micro-batch's sum is float32, so it is rounded by the rows
# that happen to be in it. All else is added in float64. What others add changes by at most 2e-4 C with 65,536 rows that
# point the same way, 128 at a time, and by less with fewer (tests/test_fixed_shapes.py).
ROUNDING = 2.0**-9
_NOISE = (1e-290, 1e290)  # standard deviation of the noise: a grid of 2^-11 of it must be a floating-point number too


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Everything that decides epsilon, and nothing else.

    Attributes:
        num_examples: size of the data set; treated as public. An example is whatever is sampled and clipped as one: a
            row, or everything that an author contributes to a step.
        expected_batch_size: sampling probability times `num_examples`; need not be a whole number. Cutting draws does
            not change it.
        steps: planned number of steps.
        clip_norm: C, the maximum norm of one example's contribution; with adaptive clipping, that of the first step.
        noise_multiplier: sigma, the noise's standard deviation divided by the sensitivity.
        delta: the probability with which the bound may fail; below 1 / num_examples.
        clipping: the clipping style; flat by default.
        group_size: maximum number of examples per privacy unit. Above 1, each example is still sampled and clipped on
            its own, and the accounting covers all examples of a unit together.
        parts: parts of the data set whose examples are drawn more or less often; None if all are drawn alike.
        max_batch: the limit on the number of examples in a draw, at least the expected batch size. If more are drawn,
            a uniformly random subset of so many stays. None for plain Poisson draws.
        noise_bands: b, the number of steps over which noise is correlated, and of groups of examples that take turns;
            1 for independent noise. b q must be at most 1, and b at most the number of steps.

    Raises:
        InvalidArgument: a value outside its range; or two of `max_batch`, parts, a group size above 1 and noise bands
            above 1 together.
    """

    num_examples: int
    expected_batch_size: float
    steps: int
    clip_norm: float
    noise_multiplier: float
    delta: float
    clipping: Clipping = FLAT
    group_size: int = 1
    parts: Parts | None = None
    max_batch: int | None = None
    noise_bands: int = 1

    def __post_init__(self) -> None:
        require_count("num_examples", self.num_examples)
        require_count("steps", self.steps)
        require_count("group_size", self.group_size)
        if self.group_size > self.num_examples:
            refuse("group_size", self.group_size, f"must be at most the {self.num_examples} examples there are")
        require_positive("clip_norm", self.clip_norm)
        require_within("clip_norm", self.clip_norm, CLIP_NORMS)
        require_positive("noise_multiplier", self.noise_multiplier)
        require_delta(self.delta, self.num_examples)
        self._check_parts()
        sampling_probability(self.expected_batch_size, self.num_examples, self.parts)
        require_max_batch(self.max_batch, self.expected_batch_size, self.group_size, self.parts)
        require_bands(
            self.noise_bands, self.sampling_probability, self.steps, self.group_size, self.parts, self.max_batch
        )
        self._check_clipping()
        if not _NOISE[0] <= self.noise_std <= _NOISE[1]:
            size = "small" if self.noise_std < 1 else "large"
            remedy = f"the noise would be too {size} for floating point at clip_norm={self.clip_norm:g}; give about 1"
            refuse("noise_multiplier", self.noise_multiplier, remedy)

    def _check_parts(self) -> None:
        if self.parts is None:
            return
        self.parts.require_sum(self.num_examples)
        if self.group_size > 1:
            refuse("group_size", self.group_size, "examples of one unit may have several weights; give no parts")

    def _check_clipping(self) -> None:
        total = self.clipping.total if isinstance(self.clipping, PerLayer) else None
        if total is not None and not isclose(self.clip_norm, total, rel_tol=1e-9):
            refuse(
                "clip_norm", self.clip_norm, f"the layers' clip norms combine to {total!r} (root of squares); give that"
            )
        if isinstance(self.clipping, Adaptive) and 2 * self.count_noise <= self.noise_multiplier:
            refuse(
                "count_noise", self.count_noise, f"must be above {self.noise_multiplier / 2}, half the noise multiplier"
            )

    @classmethod
    def for_epsilon(
        cls,
        *,
        target_epsilon: float,
        num_examples: int,
        expected_batch_size: float,
        steps: int,
        clip_norm: float,
        delta: float,
        clipping: Clipping = FLAT,
        group_size: int = 1,
        parts: Parts | None = None,
        max_batch: int | None = None,
        noise_bands: int = 1,
    ) -> PrivacyConfig:
        """The configuration with the least noise whose epsilon after `steps` is at most `target_epsilon`.

        Raises:
            InvalidArgument: a value outside its range, or a target that no useful noise reaches.
        """
        require_max_batch(max_batch, expected_batch_size, group_size, parts)
        q = sampling_probability(expected_batch_size, num_examples, parts)
        require_bands(noise_bands, q, steps, group_size, parts, max_batch)
        spend = Spend(1.0, q, steps, group_size, cut_of(max_batch, num_examples)).with_bands(noise_bands)
        sigma = accounting.noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            sampling_probability=spend.sampling_probability,
            steps=spend.steps,
            group_size=group_size,
            cut=spend.cut,
        )
        return cls(
            num_examples=num_examples,
            expected_batch_size=expected_batch_size,
            steps=steps,
            clip_norm=clip_norm,
            noise_multiplier=sigma,
            delta=delta,
            clipping=clipping,
            group_size=group_size,
            parts=parts,
            max_batch=max_batch,
            noise_bands=noise_bands,
        )

    @property
    def cut(self) -> Cut | None:
        """The limit on draws, as the accounting takes it."""
        return cut_of(self.max_batch, self.num_examples)

    @property
    def sampling_probability(self) -> float:
        """q, the probability that one draw contains a given example; with weights, an example of the largest."""
        return sampling_probability(self.expected_batch_size, self.num_examples, self.parts)

    @property
    def bands(self) -> Bands:
        """The bands of correlated noise that suit the planned steps best."""
        return best_bands(self.noise_bands, self.steps)

    def spend(self, steps: int) -> Spend:
        """What so many steps of one launch cost, as the accounting takes it."""
        one = Spend(self.noise_multiplier, self.sampling_probability, steps, self.group_size, self.cut)
        return one.with_bands(self.noise_bands)

    @property
    def sensitivity(self) -> float:
        """Maximum change, in Euclidean norm, of what a step releases before noise if one example is added or removed.

        This is the clipped sum at `clip_norm`, with `ROUNDING`; with adaptive clipping, also the scaled count next to
        it. A privacy unit of `group_size` examples can change it by this much for each of its examples that is drawn.
        Where a draw is cut, the added example may push another one out, and the change may be twice this.
        """
        return self.noise_std / self.noise_multiplier

    @property
    def gradient_noise_multiplier(self) -> float:
        """Standard deviation of the noise on the clipped sum, divided by the clip norm.

        This is the noise multiplier z that is accounted, unless a count is released too. Then it is z_g with 1 / z^2 =
        1 / z_g^2 + 1 / (2 s)^2, where s is the noise on the count. An example adds +-1/2 to the count (Andrew et al.
        2021, theorem 1). So z_g is z divided by the root of 1 - (z / 2 s)^2.
        """
        if not isinstance(self.clipping, Adaptive):
            return self.noise_multiplier
        return self.noise_multiplier / sqrt(1 - (self.noise_multiplier / (2 * self.count_noise)) ** 2)

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on adaptive clipping's count of examples."""
        if not isinstance(self.clipping, Adaptive):
            raise RuntimeError("only adaptive clipping releases a count")
        return self.clipping.count_noise or self.expected_batch_size / 20

    def count_scale(self, clip_norm: float) -> float:
        """The factor that lets the count be released together with the clipped sum, under the same noise."""
        return self.gradient_noise_multiplier * clip_norm / self.count_noise

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the global clipped sum, at `clip_norm`.

        With noise bands it is that of the independent noise that the correlated noise is made from.
        """
        return self.noise_std_per_rank(1)

    def noise_std_per_rank(self, world_size: int, clip_norm: float | None = None) -> float:
        """Standard deviation of each rank's noise; independent noises of all ranks add up to the noise on the sum.

        Args:
            world_size: number of ranks.
            clip_norm: the current step's clip norm, if it is adaptive; None for `self.clip_norm`.
        """
        return self.gradient_noise_multiplier * (clip_norm or self.clip_norm) * (1 + ROUNDING) / sqrt(world_size)

    def grid(self, clip_norm: float | None = None) -> float:
        """The grid on which a step's noisy sum is released; the same on every rank, so that ranks add exactly.

        Args:
            clip_norm: see `noise_std_per_rank`.
        """
        return grid_of(self.noise_std_per_rank(1, clip_norm))

    @property
    def divisor(self) -> float:
        """The divisor of the noisy sum: a constant, never the number of drawn examples, which is private."""
        return self.expected_batch_size

    def require_sampler(self, sampler: PoissonSampler) -> None:
        """Refuse a sampler whose draws cost another epsilon than this mechanism's.

        Raises:
            InvalidArgument: it draws from another number of examples, with another sampling probability, other weights,
                another maximal batch or in another number of groups.
        """
        if not isinstance(sampler, PoissonSampler):
            remedy = "give a dptune.PoissonSampler; an AuthorSampler has one in .authors"
            refuse("sampler", Described(type(sampler).__name__), remedy)
        given = sampler.num_examples, sampler.sampling_probability
        if given != (self.num_examples, self.sampling_probability):
            drawn = f"draws from {given[0]} examples with probability {given[1]!r}"
            wanted = f"epsilon is that of {self.num_examples} and {self.sampling_probability!r}"
            remedy = "make it as PoissonSampler(config.num_examples, config.sampling_probability)"
            refuse("sampler", Described(type(sampler).__name__), f"{drawn}, but {wanted}; {remedy}")
        if sampler.parts != self.parts:
            remedy = "make it as PoissonSampler(config.num_examples, config.sampling_probability, parts=config.parts)"
            refuse("sampler", Described(type(sampler).__name__), f"has other weights than the configuration; {remedy}")
        if sampler.max_batch != self.max_batch:
            told = f"cuts draws at {sampler.max_batch}, but epsilon is that of draws cut at {self.max_batch}"
            refuse("sampler", Described(type(sampler).__name__), f"{told}; make it with max_batch=config.max_batch")
        if sampler.noise_bands != self.noise_bands:
            told = f"draws in {sampler.noise_bands} groups, but epsilon is that of {self.noise_bands} noise bands"
            refuse("sampler", Described(type(sampler).__name__), f"{told}; make it with noise_bands=config.noise_bands")

    def planned_epsilon(self) -> float:
        """Epsilon after all planned steps; with noise bands, if one launch takes them all."""
        return accounting.compose([self.spend(self.steps)], delta=self.delta)


def cut_of(max_batch: int | None, num_examples: int) -> Cut | None:
    """The limit on draws, as the accounting takes it; None without one."""
    return None if max_batch is None else Cut(max_batch, num_examples)


def require_max_batch(
    max_batch: int | None, expected_batch_size: float, group_size: int = 1, parts: Parts | None = None
) -> None:
    """Refuse a limit on draws that cannot be, or whose cost is not known.

    Raises:
        InvalidArgument: it is no whole number of at least the expected batch size, or there are parts or groups.
    """
    if max_batch is None:
        return
    require_count("max_batch", max_batch)
    require_no_groups(max_batch, group_size)
    require_no_parts(max_batch, parts)
    if max_batch < expected_batch_size:
        remedy = f"most draws would be cut; give at least the expected batch size, {expected_batch_size:g}"
        refuse("max_batch", max_batch, remedy)


def require_bands(
    noise_bands: int,
    sampling_probability: float,
    steps: int,
    group_size: int = 1,
    parts: Parts | None = None,
    max_batch: int | None = None,
) -> None:
    """Refuse a number of noise bands that cannot be, or whose cost is not known.

    Raises:
        InvalidArgument: it is no whole number from 1 to 64, above the number of steps, or its product with the sampling
            probability is above 1; or it is above 1 and there are groups, parts or cut draws.
    """
    require_noise_bands(noise_bands, sampling_probability)
    require_plain_draws(noise_bands, parts, max_batch)
    if noise_bands > 1 and group_size > 1:
        remedy = f"units with up to {group_size} examples would have several turns; leave it out, or draw whole units"
        refuse("noise_bands", noise_bands, remedy)
    if noise_bands > steps:
        refuse("noise_bands", noise_bands, f"must be at most the number of steps, {steps}")


def sampling_probability(expected_batch_size: float, num_examples: int, parts: Parts | None = None) -> float:
    """The largest probability of any example: expected_batch_size / num_examples if all are drawn alike.

    Raises:
        InvalidArgument: it is above 1, or so small that it comes out as 0.
    """
    require_positive("expected_batch_size", expected_batch_size)
    if expected_batch_size > num_examples:
        refuse("expected_batch_size", expected_batch_size, f"must be at most the {num_examples} examples there are")
    if not expected_batch_size / num_examples > 0:
        refuse("expected_batch_size", expected_batch_size, "so small that nothing would ever be drawn; raise it")
    if parts is None:
        return expected_batch_size / num_examples
    if expected_batch_size > parts.effective_size:
        told = f"with these weights it must be at most {parts.effective_size:g}"
        remedy = "no sampling probability may be above 1; lower it, or give weights that are closer to each other"
        refuse("expected_batch_size", expected_batch_size, f"{told}: {remedy}")
    return expected_batch_size / parts.effective_size
