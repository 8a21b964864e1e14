"""A step's sum of clipped gradients, if the trained weights are sharded over the ranks by FSDP2.

FSDP gathers the weights of a layer while it computes, and never reduces a gradient. Every rank clips its own examples.
It makes the sum of one parameter at a time and sends each rank its rows. So each rank gets its shard of the sum over
all ranks. Shards are disjoint: each rank adds the whole noise to its own shard, and no value is noised twice.

Shapes: B examples; P all trained values of the model, flat; S this rank's shards of them, flat; W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from dptune._validate import Described, present, refuse
from dptune.flat import views
from dptune.per_example import HalfAdded, Recorded
from dptune.sharding import as_shard, rows_of_ranks

_SMALL = 1 << 16  # elements of a parameter that is sent together with its neighbours


@dataclass(frozen=True)
class _Parcel:
    """Parameters that are sent together: a large one alone, or neighbouring small ones.

    Attributes:
        names: the parameters, in the model's order.
        elements: {name: elements of each rank's shard}.
        place: where this rank's shards are among all of its shards.
    """

    names: Sequence[str]
    elements: Mapping[str, Sequence[int]]
    place: slice

    def of_rank(self, rank: int) -> int:
        """Elements of a rank's shards."""
        return sum(self.elements[name][rank] for name in self.names)

    def packed(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The whole parameters as one vector: first the rows of rank 0, then those of rank 1, and so on."""
        if len(self.names) == 1:
            return parts[self.names[0]].reshape(-1)
        split = [parts[name].reshape(-1).split(list(self.elements[name])) for name in self.names]
        return torch.cat([part for of_rank in zip(*split, strict=True) for part in of_rank])


class ShardedSum:
    """The sum of a model whose trained parameters are sharded; see `dptune.step_sums.StepSum`.

    Args:
        parameters: {name: trained parameter}, each sharded by its rows over the same ranks.
        counts: whether a step also releases the count of adaptive clipping. Rank 0 adds its noise.
        keep_whole: add up micro-batches on each rank, and send the sum once per step. This sends less, and takes 8
            bytes for each trained value of the whole model. Otherwise each micro-batch's sum is sent.

    Raises:
        InvalidArgument: a parameter is not sharded by rows over all ranks.
    """

    noises = 1

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, counts: bool = False, keep_whole: bool = False
    ) -> None:
        self._shards = {name: _sharded_by_rows(name, parameter) for name, parameter in parameters.items()}
        first = next(iter(self._shards.values()))
        self._mesh, self._ranks, self._rank = (
            first.device_mesh,
            first.device_mesh.size(),
            first.device_mesh.get_local_rank(),
        )
        self._computes_on = torch.device(self._mesh.device_type)
        self._kept_on, self._dtype = first.to_local().device, torch.promote_types(first.dtype, torch.float32)
        self._parcels = list(self._parcels_of(self._shards))
        self._size: int = self._parcels[-1].place.stop
        self._counts, self._keep_whole = counts, keep_whole
        self._whole_P: Tensor | None = None
        self._sum_S: Tensor | None = None
        self._sent = 0  # parcels of a micro-batch's sum that is not through
        self._count = torch.zeros(1, dtype=torch.float64, device=self._computes_on)

    @property
    def size(self) -> int:
        """Values of this rank's shards; with adaptive clipping, rank 0 adds noise to the count too."""
        return self._size + (1 if self._counts and self._rank == 0 else 0)

    def begin(self) -> None:
        """See `StepSum`."""
        self._count.zero_()
        self._sent = 0
        self._sum_S = torch.zeros(self._size, dtype=torch.float64, device=self._kept_on)
        if self._keep_whole:
            values = sum(shard.numel() for shard in self._shards.values())
            self._whole_P = torch.zeros(values, dtype=torch.float64, device=self._computes_on)

    def add(self, recorded: Recorded, weights: Mapping[str, Tensor]) -> None:
        """See `StepSum`. For each micro-batch, every rank must call this or `add_nothing`.

        An error before anything was sent passes through as it is.
        """
        if self._whole_P is not None:
            recorded.add_weighted_sums(views(self._shards, self._whole_P), weights)
            return
        try:
            for parcel in self._parcels:
                self._send(parcel, parcel.packed(self._made(parcel, recorded, weights)))
        except (RuntimeError, MemoryError) as error:
            if not self._sent:
                raise
            remedy = "resume from the last checkpoint with smaller micro-batches"
            raise HalfAdded(
                f"a sharded sum failed in part, so the step is lost; {remedy} ({type(error).__name__})"
            ) from error
        self._sent = 0

    def add_nothing(self) -> None:
        """See `StepSum`. Sends zeros, after `HalfAdded` those that are left, so that no other rank waits for them."""
        if self._whole_P is None:
            for parcel in self._parcels[self._sent :]:
                elements = sum(map(parcel.of_rank, range(self._ranks)))
                self._send(parcel, torch.zeros(elements, dtype=self._dtype, device=self._computes_on))
        self._sent = 0

    def add_count(self, count: Tensor) -> None:
        """See `StepSum`."""
        self._count += count

    def taken(self) -> Tensor:
        """See `StepSum`."""
        if self._whole_P is not None:
            parts, self._whole_P = views(self._shards, self._whole_P), None
            for parcel in self._parcels:
                self._send(parcel, parcel.packed({name: parts.pop(name) for name in parcel.names}))
        sum_S, self._sum_S = present(self._sum_S, "sum that has begun"), None
        if not self._counts:
            return sum_S
        dist.all_reduce(self._count, group=self._mesh.get_group())
        return torch.cat([sum_S, self._count.to(sum_S.device)]) if self._rank == 0 else sum_S

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """See `StepSum`. A rank's shards are complete without rank 0, so each rank waits for rank 0's word."""
        failed = torch.ones(1, device=self._computes_on)
        try:
            yield
            failed.zero_()
        finally:
            dist.all_reduce(failed, group=self._mesh.get_group())
        if failed.item():
            raise RuntimeError("rank 0 did not write this step into the ledger, so no rank may use its gradient")

    def over_ranks(self, noisy: Tensor) -> Tensor:
        """See `StepSum`; this rank's shards [S], which are complete."""
        return noisy.to(self._dtype)

    def count(self, total: Tensor) -> float:
        """See `StepSum`."""
        own = total[-1:].to(self._computes_on, torch.float64) if self._rank == 0 else torch.zeros_like(self._count)
        dist.all_reduce(own, group=self._mesh.get_group())
        return float(own)

    def gradients(self, total: Tensor) -> dict[str, Tensor]:
        """See `StepSum`."""
        found: dict[str, Tensor] = {}
        sizes = [shard.to_local().numel() for shard in self._shards.values()]
        for (name, shard), own in zip(self._shards.items(), total[: self._size].split(sizes), strict=True):
            found[name] = as_shard(own.view_as(shard.to_local()).to(shard.dtype), shard)
        return found

    def _made(self, parcel: _Parcel, recorded: Recorded, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's weighted sums for whole parameters, in their shapes; zeros for one that no layer used."""
        shards = {name: self._shards[name] for name in parcel.names}
        values = sum(shard.numel() for shard in shards.values())
        totals = views(shards, torch.zeros(values, dtype=self._dtype, device=self._computes_on))
        if own := recorded.taken(*parcel.names):
            own.add_weighted_sums(totals, {name: weights[name] for name in parcel.names if name in weights})
        return totals

    def _send(self, parcel: _Parcel, sent: Tensor) -> None:
        """Add all ranks' sums of this rank's rows to its shards, in float64."""
        own = parcel.of_rank(self._rank)
        received = sent if self._ranks == 1 else sent.new_empty(self._ranks * own)
        self._sent += 1
        if self._ranks > 1:
            sizes = [parcel.of_rank(rank) for rank in range(self._ranks)]
            dist.all_to_all_single(received, sent, [own] * self._ranks, sizes, group=self._mesh.get_group())
        shares = received.view(self._ranks, own)
        if self._kept_on != received.device:  # one copy there, instead of one for each rank
            shares = shares.sum(0, keepdim=True, dtype=torch.float64).to(self._kept_on)
        total = present(self._sum_S, "sum that has begun")[parcel.place]
        for share in shares:
            total += share

    def _parcels_of(self, shards: Mapping[str, DTensor]) -> Iterator[_Parcel]:
        start = 0
        elements = {
            name: [rows * prod(shard.shape[1:]) for rows in rows_of_ranks(shard.shape[0], self._ranks)]
            for name, shard in shards.items()
        }
        for _, group in groupby(shards, lambda name: "small" if shards[name].numel() <= _SMALL else name):
            names = list(group)
            own = sum(elements[name][self._rank] for name in names)
            yield _Parcel(names, {name: elements[name] for name in names}, slice(start, start + own))
            start += own


def _sharded_by_rows(name: str, parameter: nn.Parameter) -> DTensor:
    """The parameter, if FSDP has sharded it by its rows over all ranks."""
    by_rows = isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
    if not (isinstance(parameter, DTensor) and by_rows):
        remedy = "must be sharded by rows over all ranks, like every other trained parameter"
        refuse(name, Described(type(parameter).__name__), f"{remedy}; shard it with dptune.sharding, or freeze it")
    return parameter
