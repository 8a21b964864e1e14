"""Named-argument checks: every error is one line with the argument's name, its value and the remedy."""

from __future__ import annotations

import math
from typing import NoReturn


class InvalidArgument(ValueError):
    """A mistake of the caller's, not of the program's: scripts print it on one line and exit with status 2."""


def refuse(name: str, value: object, remedy: str) -> NoReturn:
    """Raise `InvalidArgument` as `name=value: remedy`."""
    raise InvalidArgument(f"{name}={value!r}: {remedy}")


def require_positive(name: str, value: float) -> None:
    """`value` must be a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        refuse(name, value, "give a finite number above 0")


def require_probability(name: str, value: float) -> None:
    """`value` must be in (0, 1]."""
    if not 0 < value <= 1:
        refuse(name, value, "give a number above 0 and at most 1")


def require_delta(value: float, num_examples: int | None = None, *, name: str = "delta") -> None:
    """delta must be in (0, 1), and below 1/n where the number of examples is known.

    At 1/n or more, publishing one record at random satisfies the definition (Dwork and Roth 2014, section 2.3).
    """
    if not 0 < value < 1:
        refuse(name, value, "give a number above 0 and below 1")
    if num_examples is not None and value >= 1 / num_examples:
        refuse(name, value, f"must be below 1/num_examples = {1 / num_examples:.3g}; a tenth of that is usual")


def require_count(name: str, value: int, *, minimum: int = 1) -> None:
    """`value` must be a whole number of at least `minimum`."""
    if isinstance(value, bool) or not math.isfinite(value) or int(value) != value or value < minimum:
        refuse(name, value, f"give a whole number of at least {minimum}")
