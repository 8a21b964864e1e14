"""Noise that is correlated over the steps of one launch, and why it is private.

Step t of a launch adds sigma C y_t to its clipped sum x_t, with y as in `dptune.bands`: y = A^-1 z with independent
Gaussian z and a lower triangular matrix A of b bands, whose columns have length 1.

**Guarantee** (Choquette-Choo et al. 2023, theorem 4). Draws are cyclic: each unit is in one of b groups, and step t
draws units of group t mod b alone, each with probability b q. Then T steps of one launch are as private as ceil(T / b)
steps with independent noise of the same sigma, in which every unit is drawn with probability b q.

Why, for one unit, with its group and everybody else's draws given:
1. What a step releases and the releases before it determine (A (x + y))_t = (A x)_t + z_t, and the reverse. So A x + z
   is as private as x + y, also where x_t depends on earlier releases.
2. If the unit is drawn in step s, it adds a vector of length C at most to x_s. That adds column s of A times the vector
   to A x: length C at most, in rows s to s + b - 1.
3. The unit's next turn is b steps later. So each row of A x holds one of its turns at most, and each turn is one
   Poisson-subsampled Gaussian release with probability b q, given all rows before. These compose.
4. Groups and draws do not depend on the data, and each unit's are independent of all others'. So the bound also holds
   on average over them. The group that begins has ceil(T / b) turns, and no other has more.

With adaptive clipping, C changes with the step. The same holds for x_t / C_t, since y_t is multiplied by C_t.

**Launches.** Nobody saves noise, so that no file can take it back. A resumed run begins anew: with new groups, and with
no earlier noise. Over a whole run A has one block for each launch, and a unit's columns in different blocks share no
row. So the launches compose, and the turns of all launches add up: the sum of their ceil(T / b), not ceil of the sum.
The ledger says in each line to which launch ("block") its step belongs.

Rounding to the grid comes after the noise. The earlier y are kept as they were drawn, in float64. Sums over ranks are
linear: each rank correlates its own noise.

Shapes: P values; b bands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from dptune.bands import Bands
from dptune.keystream import Keystream
from dptune.noise import GaussianNoise, add_noise


class CorrelatedNoise:
    """The y of one launch, from independent noise; see `GaussianNoise`, which has the same interface.

    It keeps the last b - 1 of them: with the one in the making, 8 b bytes of the host's memory per value.

    Args:
        noise: the independent z. It must serve nothing else.
        bands: the bands of A.
    """

    def __init__(self, noise: GaussianNoise, bands: Bands) -> None:
        self._noise, self._bands = noise, bands
        self._earlier: deque[list[Tensor]] = deque(maxlen=bands.count - 1)  # each step's y in parts, the latest first
        self._steps = 0

    @property
    def size(self) -> int:
        """Number of values per step, P."""
        return self._noise.size

    @property
    def keystream(self) -> Keystream:
        """The randomness of z."""
        return self._noise.keystream

    @property
    def source(self) -> str:
        """Where the noise comes from, in words for the report."""
        return f"{self._noise.source}, correlated over {self._bands.count} steps"

    @property
    def relative_std(self) -> float:
        """Standard deviation of each value of the last step's y, over that of z; that of the first before any step."""
        return self._bands.std(max(1, self._steps))

    def add_to(self, sum_P: Tensor, std: float, *, grid: float) -> None:
        """See `add_noise`; `std` is that of independent noise."""
        add_noise(self.parts(), sum_P, std, grid=grid)

    def parts(self) -> Iterator[Tensor]:
        """The next y, float64 on the CPU, in parts that are [P] together. Take all of them."""
        first, *others = self._bands.coefficients
        latest: list[Tensor] = []
        for number, values in enumerate(self._noise.parts()):
            for coefficient, earlier in zip(others, self._earlier, strict=False):
                values.sub_(earlier[number], alpha=coefficient)
            values.div_(first)
            latest.append(values.clone())  # the caller may overwrite its part
            yield values
        self._earlier.appendleft(latest)
        self._steps += 1

    def close(self) -> None:
        """End the threads of the independent noise, and forget all noise."""
        self._earlier.clear()
        self._noise.close()
