"""How much noise a private run adds, compared with what it can learn."""

from __future__ import annotations

import math

from dptune.bands import INDEPENDENT, Bands
from dptune.mechanism import PrivacyConfig


def noise_batch_ratio(config: PrivacyConfig) -> float:
    """The noise of a step over what a batch can add up to: sigma C over B C, in every direction.

    With correlated noise it is that of the independent noise whose sums over the steps have the same error. Training
    depends on the noise through this ratio (McKenna et al. 2025, "Scaling Laws for Differentially Private Language
    Models").
    """
    return config.noise_multiplier * error_ratio(config.bands, config.steps) / config.expected_batch_size


def error_ratio(bands: Bands, steps: int) -> float:
    """The error of the sums over `steps` with these noise bands, over that with independent noise of the same size."""
    return bands.error(steps) / INDEPENDENT.error(steps)


def noise_over_signal(config: PrivacyConfig, trained: int) -> float:
    """How long the noise of all steps together is, over the longest that all clipped gradients together can be.

    A step adds noise of length sigma C sqrt(P) to a sum of B gradients, each at most C long. Over T steps the gradients
    add up to T B C if all of them agree, and the noise, which is drawn anew each time, to sigma C sqrt(T P). Correlated
    noise adds up to less, by the ratio of the errors of its bands and of independent noise.

    Args:
        config: the mechanism.
        trained: P, the number of trained parameters.
    """
    return noise_batch_ratio(config) * math.sqrt(trained / config.steps)
