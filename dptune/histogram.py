"""How many private records fall into each of some public buckets, with Gaussian noise.

The buckets must be fixed without a look at the private records (here: clusters of synthetic texts), else no epsilon
covers them. Every privacy unit has one vote: a record's goes to its bucket whole, and where a unit has m records each
casts 1/m of it. So adding or removing one unit moves the counts by at most 1 in L2 (and in L1) norm, and noise of
standard deviation sigma makes them a Gaussian mechanism with noise multiplier sigma. What is made of the noisy counts
afterwards (rounding, clamping, resampling) costs nothing more.

The sum of a count and noise in floating point would tell the count by its last bits: only some doubles can be reached
from each count (Mironov 2012, "On significance of the least significant bits for differential privacy"). So it is
rounded to a grid that sigma alone decides, 2^-11 to 2^-10 of sigma. The noise is far finer than that: its values are
less than 2^-18 sigma apart out to 11 sigma (2^-48 out to 8), beyond which a Gaussian has a mass of 4e-28. So from any
count each point of the grid is reached by many of them, about as likely as by a Gaussian. This holds for counts that
are no multiples of the grid too (shares of 1/m), because a count is never rounded by itself, only its noisy sum.

No torch in this file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from dptune._validate import refuse, require_count, require_positive
from dptune.keystream import Keystream

SENSITIVITY = 1.0  # L2, of `votes`, to adding or removing one unit
_GRID_BITS = 10  # a finer grid comes nearer to the doubles' own, a coarser one adds error: this one, sigma^2 / 10^7


def votes(buckets: np.ndarray, num_buckets: int, units: Sequence[Hashable] | None = None) -> np.ndarray:
    """Private counts, float64 [K]: not for release.

    Args:
        buckets: of each record, int [N], in 0 to K - 1.
        num_buckets: K.
        units: of each record the privacy unit it belongs to; None where each record is one of its own.

    Raises:
        InvalidArgument: K below 1, or not one bucket, and one unit if there are units, per record.
    """
    require_count("num_buckets", num_buckets)
    if buckets.ndim != 1:
        refuse("buckets", buckets.shape, "give one bucket per record, [N]")
    if units is not None and len(units) != len(buckets):
        refuse("units", len(units), f"give one for each of the {len(buckets)} records")
    if units is None:
        return np.bincount(buckets, minlength=num_buckets).astype(np.float64)
    records = Counter(units)
    shares = np.array([1 / records[unit] for unit in units])
    return np.bincount(buckets, weights=shares, minlength=num_buckets)


def release(votes_K: np.ndarray, noise_multiplier: float, keystream: Keystream | None = None) -> np.ndarray:
    """`votes_K` with independent Gaussian noise of standard deviation `noise_multiplier` x SENSITIVITY, float64 [K].

    Multiples of `grid(noise_multiplier)`. Enter it into the budget before (`dptune.budget.Budget.enter_gaussian`). Each
    call is one release more.

    Args:
        votes_K: counts to which one privacy unit contributes at most 1 in L2 norm.
        noise_multiplier: sigma.
        keystream: for tests alone; by default a fresh one keyed from the operating system. No seed reaches it.

    Raises:
        InvalidArgument: a noise multiplier that is not above 0.
    """
    require_positive("noise_multiplier", noise_multiplier)
    noise = noise_multiplier * SENSITIVITY * _standard_normals(keystream or Keystream.from_os(), len(votes_K))
    step = grid(noise_multiplier)
    return np.asarray(np.rint((votes_K + noise) / step) * step, dtype=np.float64)


def grid(noise_multiplier: float) -> float:
    """What released votes are multiples of: a power of two, 2^-11 to 2^-10 of the noise's standard deviation."""
    _, exponent = math.frexp(noise_multiplier * SENSITIVITY)
    return math.ldexp(1.0, exponent - 1 - _GRID_BITS)


def _standard_normals(keystream: Keystream, size: int) -> np.ndarray:
    """N(0, 1) values, float64: a sign, and the quantile of a uniform of 106 bits, fine in the tail as well."""
    uniforms = keystream.uniforms(size)
    uniforms += 2.0**-53 * (keystream.uniforms(size) + 2.0**-54)  # above 0, where the quantile function is infinite
    signs = 1.0 - 2.0 * (keystream.words(size) & np.uint64(1))
    from scipy.special import ndtri  # slow to import: not before it computes

    return np.asarray(signs * ndtri(uniforms / 2))
