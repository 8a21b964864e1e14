"""The one place where sampling probability, noise multiplier, clip norm and divisor meet.

What a step releases is (sum over a Poisson draw of clipped per-example gradients + N(0, (sigma C)^2)) / expected batch
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from dptune import accounting
from dptune._validate import refuse, require_count, require_delta, require_positive


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Everything that decides epsilon, and nothing else.

    Attributes:
        num_examples: privacy units in the data set; treated as public.
        expected_batch_size: sampling probability times `num_examples`; need not be whole.
        steps: planned number of steps.
        clip_norm: C, the largest norm of one example's contribution.
        noise_multiplier: sigma, the noise's standard deviation over the sensitivity.
        delta: the probability with which the bound may fail; below 1 / num_examples.

    Raises:
        InvalidArgument: a value outside its range.
    """

    num_examples: int
    expected_batch_size: float
    steps: int
    clip_norm: float
    noise_multiplier: float
    delta: float

    def __post_init__(self) -> None:
        require_count("num_examples", self.num_examples)
        require_count("steps", self.steps)
        require_positive("clip_norm", self.clip_norm)
        require_positive("noise_multiplier", self.noise_multiplier)
        require_delta(self.delta, self.num_examples)
        sampling_probability(self.expected_batch_size, self.num_examples)

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
    ) -> PrivacyConfig:
        """The configuration with the least noise whose epsilon after `steps` is at most `target_epsilon`."""
        sigma = accounting.noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            sampling_probability=sampling_probability(expected_batch_size, num_examples),
            steps=steps,
        )
        return cls(
            num_examples=num_examples,
            expected_batch_size=expected_batch_size,
            steps=steps,
            clip_norm=clip_norm,
            noise_multiplier=sigma,
            delta=delta,
        )

    @property
    def sampling_probability(self) -> float:
        """q: the chance of one example to be in one draw."""
        return sampling_probability(self.expected_batch_size, self.num_examples)

    @property
    def sensitivity(self) -> float:
        """How far adding or removing one privacy unit moves the clipped sum, in Euclidean norm."""
        return self.clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the global clipped sum."""
        return self.noise_multiplier * self.sensitivity

    def noise_std_per_rank(self, world_size: int) -> float:
        """Each rank's share: independent shares of this size add up to `noise_std`."""
        return self.noise_std / sqrt(world_size)

    @property
    def divisor(self) -> float:
        """What the noisy sum is divided by: a constant, never the number drawn, which is private."""
        return self.expected_batch_size

    def planned_epsilon(self) -> float:
        """Epsilon after all planned steps."""
        return accounting.epsilon(
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            steps=self.steps,
            delta=self.delta,
        )


def sampling_probability(expected_batch_size: float, num_examples: int) -> float:
    """expected_batch_size / num_examples, refused above 1."""
    require_positive("expected_batch_size", expected_batch_size)
    if expected_batch_size > num_examples:
        refuse("expected_batch_size", expected_batch_size, f"must be at most the {num_examples} examples there are")
    return expected_batch_size / num_examples
