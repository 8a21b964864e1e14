"""Poisson draws that are cut at a maximal batch of N: what the cut costs one step.

A cut bounds the time and memory of a step, and couples the examples: an added example may push another one out. Compare
a step on a data set with the same step after one example is added. Fix what is drawn of the others, and their order of
preference, so the batch without the new example is fixed too. With the new example the batch is
- the same, unless the new example is drawn, which has the probability q,
- or else the batch and the new example, if there was room: the sum moves by at most C,
- or else the batch with the new example instead of another, or the same batch: the sum moves by at most 2C.
A batch without room holds N, so at least N of the others were drawn. Others are at most as many as the data set has
examples, for an example that is added and for one that is removed. So there is no room with a probability of at most
p = P(Binomial(n, q) >= N), whatever the data.

The hockey-stick divergence is jointly convex. So no epsilon of the step is above that of a release which tells whether
there was room, and then is a Poisson-subsampled Gaussian release: with the sensitivity C, or with 2C. Such a mixture
dominates the step at every epsilon and in both directions, so it composes over adaptive steps (Zhu et al. 2022,
"Optimal accounting of differential privacy via characteristic function"). dp-accounting has a bound for the same draws
("Tighter privacy analysis for truncated Poisson sampling", arXiv 2508.15089). There a full batch replaces an example in
both directions. The two bounds differ by a few per cent.

No torch in this file.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

_RELATIVE, _ABSOLUTE = 1 + 1e-6, 1e-30  # above the errors of a binomial tail, and large enough to compute with


class Cut(NamedTuple):
    """A limit on the number of examples in a draw.

    Attributes:
        max_batch: N. If more are drawn, N of them stay.
        num_examples: n, the size of the data set.
    """

    max_batch: int
    num_examples: int

    def full_probability(self, sampling_probability: float) -> float:
        """p, an upper bound on the probability that an added or removed example finds no room in a batch."""
        return _full_probability(self.max_batch, self.num_examples, sampling_probability)

    @property
    def ever_happens(self) -> bool:
        """Whether a draw of the data set, or of one with another example, can be cut."""
        return self.max_batch <= self.num_examples


@lru_cache(maxsize=1024)
def _full_probability(max_batch: int, num_examples: int, sampling_probability: float) -> float:
    from scipy.stats import binom

    tail = float(binom.sf(max_batch - 1, num_examples, sampling_probability))
    return min(1.0, tail * _RELATIVE + _ABSOLUTE)
