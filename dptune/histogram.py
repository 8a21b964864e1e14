"""How many private records fall into each of some public buckets, with Gaussian noise.

The buckets must be fixed without a look at the private records (here: clusters of synthetic texts), else no epsilon
covers them. Every privacy unit has one vote: a record's goes to its bucket whole, and where a unit has m records each
casts 1/m of it. So adding or removing one unit moves the counts by at most 1 in L2 (and in L1) norm, and noise of
standard deviation sigma makes them a Gaussian mechanism with noise multiplier sigma. What is made of the noisy counts
afterwards (clamping, resampling) costs nothing more.

No torch in this file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import ndtri

from dptune._validate import require_count, require_positive
from dptune.keystream import Keystream

SENSITIVITY = 1.0  # L2, of `votes`, to adding or removing one unit
_SMALLEST_UNIFORM = 2.0**-54  # stands for 0, where the quantile function is infinite


def votes(buckets: np.ndarray, num_buckets: int, units: Sequence[Hashable] | None = None) -> np.ndarray:
    """Private counts, float64 [K]: not for release.

    Args:
        buckets: of each record, int [N], in 0 to K - 1.
        num_buckets: K.
        units: of each record the privacy unit it belongs to; None where each record is one of its own.

    Raises:
        InvalidArgument: K below 1.
    """
    require_count("num_buckets", num_buckets)
    assert buckets.ndim == 1, f"one bucket a record, not an array of shape {buckets.shape}"
    assert units is None or len(units) == len(buckets), f"{len(units or ())} units for {len(buckets)} records"
    if units is None:
        return np.bincount(buckets, minlength=num_buckets).astype(np.float64)
    records = Counter(units)
    shares = np.array([1 / records[unit] for unit in units])
    return np.bincount(buckets, weights=shares, minlength=num_buckets)


def release(votes_K: np.ndarray, noise_multiplier: float, keystream: Keystream | None = None) -> np.ndarray:
    """`votes_K` with independent Gaussian noise of standard deviation `noise_multiplier` x SENSITIVITY, float64 [K].

    Enter it into the budget before (`dptune.budget.Budget.enter_gaussian`). Each call is one release more.

    Args:
        votes_K: counts to which one privacy unit contributes at most 1 in L2 norm.
        noise_multiplier: sigma.
        keystream: for tests alone; by default a fresh one keyed from the operating system. No seed reaches it.

    Raises:
        InvalidArgument: a noise multiplier that is not above 0.
    """
    require_positive("noise_multiplier", noise_multiplier)
    uniforms = (keystream or Keystream.from_os()).uniforms(len(votes_K))
    noise = ndtri(np.maximum(uniforms, _SMALLEST_UNIFORM))
    return np.asarray(votes_K + noise_multiplier * SENSITIVITY * noise, dtype=np.float64)
