"""A step's sum of clipped gradients, before and after its noise, if every rank holds the trained weights whole.

Each rank sums its own examples and adds its share of the noise. Then the noisy sums are added over ranks. For trained
weights that are sharded, `dptune.sharded_sum` has the same interface.

Shapes: B examples; P all values that a step releases, flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from dptune._validate import present
from dptune.flat import views
from dptune.per_example import Recorded
from dptune.ranks import Gather, Reduce, sum_over_ranks


class StepSum(Protocol):
    """The sum of one step at a time."""

    @property
    def size(self) -> int:
        """Number of values that this rank adds noise to."""

    @property
    def noises(self) -> int:
        """Number of independent noises, of different ranks, that add up on each value."""

    def begin(self) -> None:
        """Begin a step's sum, at 0."""

    def add(self, recorded: Recorded, weights: Mapping[str, Tensor]) -> None:
        """Add the weighted sums of a micro-batch's gradients, which consumes them.

        Args:
            recorded: this rank's per-example gradients.
            weights: {parameter: a factor per example, [B]}.

        Raises:
            HalfAdded: memory ran out after a part was added, so the step is lost.
        """

    def add_nothing(self) -> None:
        """Take part in the sum of a micro-batch of which this rank has no gradients."""

    def add_count(self, count: Tensor) -> None:
        """Add to the count of adaptive clipping, float64 []."""

    def taken(self) -> Tensor:
        """The values that this rank adds noise to, float64 [size]; the next step begins with a new sum."""

    def agreed(self) -> AbstractContextManager[None]:
        """A context for rank 0's ledger line. No rank leaves it without an error unless the line is written."""

    def over_ranks(self, noisy: Tensor) -> Tensor:
        """The noisy sum of all ranks, as far as this rank needs it, from its own noisy values."""

    def count(self, total: Tensor) -> float:
        """The noisy count of adaptive clipping."""

    def gradients(self, total: Tensor) -> dict[str, Tensor]:
        """{parameter: its part of what `over_ranks` returned, as a tensor like the parameter}."""


class WholeSum:
    """The sum of a model whose trained parameters every rank holds whole.

    Args:
        parameters: {name: trained parameter}.
        size: number of values that a step releases: those of the parameters, and the count of adaptive clipping.
        gather, reduce, world_size: see `dptune.ranks.sum_over_ranks`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        size: int,
        *,
        gather: Gather | None = None,
        reduce: Reduce | None = None,
        world_size: int = 1,
    ) -> None:
        self.size, self.noises = size, world_size
        self._parameters = parameters
        self._gather, self._reduce = gather, reduce
        first = next(iter(parameters.values()))
        self._device, self._dtype = first.device, torch.promote_types(first.dtype, torch.float32)
        self._sum_P: Tensor | None = None

    def begin(self) -> None:
        """See `StepSum`. In float64 the order of the rows does not matter, as it does in float32.

        The sum is never stored in `.grad`: code that keeps `.grad` would see sums without noise.
        """
        self._sum_P = torch.zeros(self.size, dtype=torch.float64, device=self._device)

    def add(self, recorded: Recorded, weights: Mapping[str, Tensor]) -> None:
        """See `StepSum`."""
        recorded.add_weighted_sums(views(self._parameters, present(self._sum_P, "sum that has begun")), weights)

    def add_nothing(self) -> None:
        """See `StepSum`. Ranks meet at the end of the step alone."""

    def add_count(self, count: Tensor) -> None:
        """See `StepSum`."""
        present(self._sum_P, "sum that has begun")[-1] += count

    def taken(self) -> Tensor:
        """See `StepSum`."""
        sum_P, self._sum_P = present(self._sum_P, "sum that has begun"), None
        return sum_P

    def agreed(self) -> AbstractContextManager[None]:
        """See `StepSum`. There is nothing to agree on: without rank 0's share no rank has the gradient."""
        return nullcontext()

    def over_ranks(self, noisy: Tensor) -> Tensor:
        """See `StepSum`; the whole sum [P] on every rank."""
        total_P = noisy.to(self._dtype)
        sum_over_ranks(total_P, world_size=self.noises, gather=self._gather, reduce=self._reduce)
        return total_P

    def count(self, total: Tensor) -> float:
        """See `StepSum`."""
        return float(total[-1])

    def gradients(self, total: Tensor) -> dict[str, Tensor]:
        """See `StepSum`."""
        parts = views(self._parameters, total)
        return {name: part.to(self._parameters[name].dtype) for name, part in parts.items()}
