"""Per-example gradients of all adapters in one buffer [B, P], so that norms and sums take a few operations in all.

Each adapted layer's backward pass makes its two products straight into its columns. A norm is then one reduction over
columns, and a clipped sum one product, whatever the number of layers.

Shapes: B examples, P values of all adapters, T tokens, M rows and N columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Number of squares that are summed in float32 (error 2e-7) before float64 takes over. Summing 2 million in float32 gave
# norms that were 3e-5 too small on a CPU, 20 million 1e-3. With too small a norm, the clipped gradient exceeds the
# sensitivity.
BLOCK = 1 << 16


class _Columns(NamedTuple):
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


class Layout:
    """Which columns of the buffer belong to which parameter.

    Args:
        parameters: {name: matrix}, in the order of the released sum.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.columns: dict[str, _Columns] = {}
        self.size = 0
        for name, parameter in parameters.items():
            self.columns[name] = _Columns(self.size, parameter.shape)
            self.size += parameter.numel()

    def runs(self, key: Callable[[str], object]) -> Iterator[tuple[str, list[str], slice]]:
        """(first name, names, their columns) of neighbours with the same key."""
        for _, group in groupby(self.columns, key):
            names = list(group)
            yield names[0], names, slice(self.columns[names[0]].start, self.columns[names[-1]].stop)


@dataclass
class FlatGradients:
    """The per-example gradients of one micro-batch.

    Attributes:
        layout: what the columns are.
        values: [B, P] in float32 or better. Columns of parameters outside `used` are undefined until `finished`.
        used: parameters that were added to.
    """

    layout: Layout
    values: Tensor
    used: set[str] = field(default_factory=set)

    @staticmethod
    def empty(layout: Layout, examples: int, like: Tensor) -> FlatGradients:
        """Room for a number of examples, on the device of `like` and at least in its precision."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return FlatGradients(layout, torch.empty(examples, layout.size, dtype=dtype, device=like.device))

    def add_product(self, name: str, left_BTM: Tensor, right_BTN: Tensor) -> None:
        """Add the sum over t of left[b, t] right[b, t]^T to each example b's gradient of a matrix [M, N]."""
        left, right = left_BTM.to(self.values.dtype).transpose(1, 2), right_BTN.to(self.values.dtype)
        own = self._of(name)
        if name in self.used:
            own.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=own)
            self.used.add(name)

    def finished(self) -> FlatGradients:
        """The same with zeros for the parameters that nothing was added to."""
        for _, names, columns in self.layout.runs(self.used.__contains__):
            if names[0] not in self.used:
                self.values[:, columns] = 0
        return self

    def copied(self) -> FlatGradients:
        """A copy, because a weighted sum consumes the gradients."""
        return FlatGradients(self.layout, self.values.clone(), self.used)

    def folded(self, rows_per_unit: int) -> FlatGradients:
        """The same with every `rows_per_unit` neighbouring examples summed."""
        return FlatGradients(self.layout, self.values.unflatten(0, (-1, rows_per_unit)).sum(1), self.used)

    def materialised(self) -> dict[str, Tensor]:
        """{used parameter: gradients [B, M, N]}, views."""
        return {name: self._of(name) for name in self.layout.columns if name in self.used}

    def squared_norms(self, groups: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """(group, squared norms [B] float64) of used parameters; a group may come several times.

        Args:
            groups: {parameter: the group that it is measured with}.
        """

        def group(name: str) -> str | None:
            return groups[name] if name in self.used else None

        runs = [(groups[first], columns) for first, _, columns in self.layout.runs(group) if first in self.used]
        found = squared_norms_of([self.values[:, columns] for _, columns in runs])
        yield from zip((name for name, _ in runs), found, strict=True)

    def weighted_sums(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
        """(neighbouring parameters, the weighted sum of their gradients over the examples, flat).

        Consumes the gradients: those of examples with weight 0 become 0, because 0 * inf is not 0.

        Args:
            weights: {parameter: [B]}; unused parameters may be missing. Neighbours with the same tensor are summed in
                one product.
        """
        for first, names, columns in self.layout.runs(lambda name: id(weights.get(name))):
            if first not in weights:
                continue
            own, weights_B = self.values[:, columns], weights[first]
            clear_rows(own, weights_B == 0)
            yield names, weights_B.to(own.dtype) @ own

    def _of(self, name: str) -> Tensor:
        start, (rows, columns) = self.layout.columns[name]
        sizes = (len(self.values), rows, columns)
        return self.values.as_strided(sizes, (self.layout.size, columns, 1), start)


def clear_rows(values_BN: Tensor, rows_B: Tensor) -> None:
    """Set some rows, given as a mask [B], to 0. On an accelerator, the host does not wait to learn which."""
    if values_BN.device.type == "cpu":
        for row in rows_B.nonzero():
            values_BN[row] = 0
    else:
        values_BN.masked_fill_(rows_B[:, None], 0)


def without_rows(values: Tensor, rows_B: Tensor) -> Tensor:
    """The values [B, ...] with zeros in some rows, given as a mask [B].

    A CPU, for which looking is cheap, keeps the tensor as it is if there is no such row.
    """
    if values.device.type == "cpu" and not bool(rows_B.any()):
        return values
    return torch.where(rows_B.view(-1, *[1] * (values.ndim - 1)), 0, values)


def add_to_totals(totals: Mapping[str, Tensor], names: Iterable[str], flat: Tensor) -> None:
    """totals[name] += its part of `flat`. Totals that lie one behind the other in memory are added to at once."""
    own = [totals[name] for name in names]
    whole = _whole(own)
    if whole is not None:
        whole.add_(flat)
        return
    for total, part in zip(own, flat.split([total.numel() for total in own]), strict=True):
        total.add_(part.view_as(total))


def _whole(parts: list[Tensor]) -> Tensor | None:
    """One flat view of tensors that lie one behind the other in one storage; None if they do not."""
    start = place = parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == place):
            return None
        place += part.numel()
    return parts[0].as_strided((place - start,), (1,), start)


def squared_norms_of(many: Sequence[Tensor]) -> list[Tensor]:
    """Squared norms of the rows of each tensor [B, N], [B] float64.

    Sums are in the values' precision within blocks, in float64 over blocks. All tensors share most operations.
    """
    if not many:
        return []
    blocks = [_norms_of_blocks(values) for values in many]
    squares = torch.cat([part for parts in blocks for part in parts], dim=1).double().square()
    sizes = [sum(part.shape[1] for part in parts) for parts in blocks]
    return [own[:, 0] if own.shape[1] == 1 else own.sum(1) for own in squares.split(sizes, dim=1)]


def _norms_of_blocks(values_BN: Tensor) -> list[Tensor]:
    """Norms of whole blocks of the rows, and of the rest: each [B, blocks]."""
    whole = values_BN.shape[1] // BLOCK * BLOCK
    found: list[Tensor] = []
    if whole:
        found.append(torch.linalg.vector_norm(values_BN[:, :whole].unflatten(1, (-1, BLOCK)), dim=2))
    if values_BN.shape[1] > whole:
        found.append(torch.linalg.vector_norm(values_BN[:, whole:], dim=1, keepdim=True))
    return found
