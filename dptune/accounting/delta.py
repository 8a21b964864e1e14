"""The delta of a run that was given none: small against the number of privacy units, and easy to read."""

from __future__ import annotations

from dptune._validate import require_count

_SHARE = 10  # at 1/n a release of one random record would pass, so delta stays at a tenth of it or less


def default_delta(num_examples: int) -> float:
    """A tenth of 1 / `num_examples`, rounded down to a power of ten.

    Args:
        num_examples: size of the training set: examples, or authors if they are sampled.

    >>> default_delta(2_000), default_delta(100), default_delta(101)
    (1e-05, 0.001, 0.0001)
    """
    require_count("num_examples", num_examples)
    digits = len(str(_SHARE * num_examples - 1))  # the smallest k with 10^k >= 10 n, without rounding
    return float(f"1e-{digits}")


def delta_in_words(num_examples: int, sampled: str = "examples") -> str:
    """The default delta with its reason.

    >>> delta_in_words(2_000)
    'delta 1e-05: a tenth of 1 / 2,000 examples, rounded down to a power of ten'
    """
    reason = f"a tenth of 1 / {num_examples:,} {sampled}, rounded down to a power of ten"
    return f"delta {default_delta(num_examples):g}: {reason}"
