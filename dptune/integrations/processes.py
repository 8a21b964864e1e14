"""The processes of one training run, from accelerate's state, which `TrainingArguments` sets up."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from torch import nn

from dptune.ranks import Ranks
from dptune.sharding import are_sharded, reshard


def ranks_of_launch() -> Ranks:
    """The processes that accelerate knows; a single rank if there is one process."""
    state = PartialState()
    if state.num_processes == 1:
        return Ranks()
    return Ranks(state.process_index, state.num_processes, gather=gather, broadcast=_broadcast)


def _broadcast(value: object) -> object:
    """Rank 0's value, on every rank."""
    return broadcast_object_list([value])[0]


@torch.no_grad()
def copy_from_main(model: nn.Module) -> None:
    """Copy the main process's weights to all others, because each process initialised new layers at random.

    Of sharded weights each process has its own rows, which no other process has.
    """
    if PartialState().num_processes > 1:
        reshard(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            if not are_sharded([tensor]):
                torch.distributed.broadcast(tensor, src=0)
