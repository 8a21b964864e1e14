"""The grid on which noisy values are released, so that their last bits reveal nothing.

A floating-point sum of a value and noise can reach only some numbers, and which ones depends on the value. So the last
bits of an unrounded sum reveal the value, whatever the noise (Mironov 2012, "On significance of the least significant
bits for differential privacy"). A released value is therefore rounded to a grid that depends on the noise's standard
deviation alone. The noise is drawn in float64, far finer than the grid. So many noise values lead to each point of the
grid, with about the probability that a Gaussian gives it.

Rounding comes after the noise. It is post-processing: it changes neither the sensitivity nor epsilon.

No torch in this file.
"""

from __future__ import annotations

import math

from dptune._validate import require_positive

_BITS = 10  # a finer grid comes closer to that of floating-point numbers; a coarser one adds error


def grid_of(std: float) -> float:
    """The grid for noise of standard deviation `std`: a power of two, 2^-11 to 2^-10 of it.

    Rounding to it adds at most std^2 / 10^7 of variance.

    Raises:
        InvalidArgument: `std` is not above 0.
    """
    require_positive("std", std)
    _, exponent = math.frexp(std)
    return math.ldexp(1.0, exponent - 1 - _BITS)
