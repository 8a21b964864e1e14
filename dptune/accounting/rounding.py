"""Epsilons for display, rounded up, because a bound must stay a bound when it is shown."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

_EXACT = Context(prec=400)  # enough digits for every float, so only the rounding below changes a value


def rounded_up(epsilon: float, digits: int = 4, *, trim: bool = False) -> str:
    """`epsilon` as text, rounded up to `digits` decimals.

    Args:
        epsilon: the value; infinity becomes "inf".
        digits: number of decimals; -1 rounds to tens, and so on.
        trim: drop zeros at the end.

    >>> rounded_up(2.25711), rounded_up(8.0, 2), rounded_up(8.0, 2, trim=True)
    ('2.2572', '8.00', '8')
    """
    if not math.isfinite(epsilon):
        return f"{epsilon}"
    shown = Decimal(repr(float(epsilon))).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING, _EXACT)
    text = f"{shown:f}"
    return text.rstrip("0").rstrip(".") if trim and "." in text else text


def rounded_up_to_figures(epsilon: float, figures: int = 4) -> str:
    """`epsilon` as text, rounded up to `figures` significant figures.

    >>> rounded_up_to_figures(0.0123411), rounded_up_to_figures(12341.1)
    ('0.01235', '12350')
    """
    if not 0 < epsilon < math.inf:
        return rounded_up(epsilon, trim=True)
    return rounded_up(epsilon, figures - 1 - math.floor(math.log10(epsilon)))
