"""A noisy histogram: how many private records fall into each of several public buckets, with Gaussian noise.

The buckets (here: clusters of synthetic texts) must be fixed without looking at the private records; otherwise no
epsilon covers them. Every privacy unit has one vote. If a unit has m records, each casts 1/m of it. So adding or
removing one unit changes the counts by at most 1 in L2 (and L1) norm. Noise of standard deviation sigma then makes a
Gaussian mechanism with noise multiplier sigma. Post-processing of the noisy counts (rounding, clamping, resampling)
costs nothing more.

The noisy counts are rounded to a grid that depends on sigma alone (`dptune.grid`). The noise is far finer than the
grid. Its values are less than 2^-48 sigma apart up to 8 sigma, and less than 2^-18 sigma up to 11 sigma. A Gaussian
lies beyond with a probability of 4e-28. Counts that are not multiples of the grid (shares of 1/m) are covered too,
because only the noisy sum is rounded, never the count.

No torch in this file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from dptune._validate import refuse, require_count, require_positive
from dptune.grid import grid_of
from dptune.keystream import Keystream
from dptune.units.names import author_name

SENSITIVITY = 1.0  # L2 sensitivity of `votes` to adding or removing one unit


def votes(buckets: np.ndarray, num_buckets: int, units: Sequence[Hashable] | None = None) -> np.ndarray:
    """Private counts, float64 [K]. NOT for release.

    Args:
        buckets: bucket of each record, int [N], from 0 to K - 1.
        num_buckets: K.
        units: privacy unit of each record, N of them; None if each record is a separate unit. Texts and numbers are
            names of people: all spellings of one number are one unit (`dptune.units.names.author_name`).

    Raises:
        InvalidArgument: K is below 1, or `buckets` and `units` do not have one entry per record.
    """
    require_count("num_buckets", num_buckets)
    if buckets.ndim != 1:
        refuse("buckets", buckets.shape, "give one bucket per record, [N]")
    if units is not None and len(units) != len(buckets):
        refuse("units", len(units), f"give one unit for each of the {len(buckets)} records")
    if units is None:
        return np.bincount(buckets, minlength=num_buckets).astype(np.float64)
    known = [_known(unit) for unit in units]
    records = Counter(known)
    shares = np.array([1 / records[unit] for unit in known])
    return np.bincount(buckets, weights=shares, minlength=num_buckets)


def _known(unit: Hashable) -> Hashable:
    """The name of a unit that is a text or a number, any other unit as it is."""
    try:
        return author_name(unit)
    except TypeError:
        return unit


def release(votes_K: np.ndarray, noise_multiplier: float, keystream: Keystream | None = None) -> np.ndarray:
    """`votes_K` plus independent Gaussian noise of standard deviation `noise_multiplier` x SENSITIVITY, float64 [K].

    The values are multiples of `grid_of(noise_multiplier)`. Each call is one more release: enter it into the budget
    first (`dptune.budget.Budget.enter_gaussian`).

    Args:
        votes_K: counts to which one privacy unit contributes at most 1 in L2 norm.
        noise_multiplier: sigma.
        keystream: for tests only; by default a new one, keyed from the operating system.

    Raises:
        InvalidArgument: the noise multiplier is not above 0.
    """
    require_positive("noise_multiplier", noise_multiplier)
    noise = noise_multiplier * SENSITIVITY * _standard_normals(keystream or Keystream.from_os(), len(votes_K))
    step = grid_of(noise_multiplier * SENSITIVITY)
    return np.asarray(np.rint((votes_K + noise) / step) * step, dtype=np.float64)


def _standard_normals(keystream: Keystream, size: int) -> np.ndarray:
    """N(0, 1) values, float64 [size]: a sign times the quantile of a 106-bit uniform, which is fine in the tail too."""
    uniforms = keystream.uniforms(size)
    uniforms += 2.0**-53 * (keystream.uniforms(size) + 2.0**-54)  # above 0, where the quantile function is infinite
    signs = 1.0 - 2.0 * (keystream.words(size) & np.uint64(1))
    from scipy.special import ndtri  # slow to import, so only here

    return np.asarray(signs * ndtri(uniforms / 2))
