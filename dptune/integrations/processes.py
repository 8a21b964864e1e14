"""What the processes of one training run do together, through accelerate's state, which `TrainingArguments` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from dptune._validate import InvalidArgument
from dptune.keystream import Keystream, new_key

T = TypeVar("T")


def from_main(work: Callable[[], T]) -> T:
    """What `work()` gives on the main process, on every process; what it refuses is refused on all, so none waits."""
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except InvalidArgument as error:
            outcome[1] = error
    value, refusal = broadcast_object_list(outcome)
    if refusal is not None:
        raise refusal
    return value


def sampling_keystream(test_seed: int | None) -> Keystream:
    """The draws' keystream, the same on every process, secret without a test's seed. Every process calls it."""
    if test_seed is not None:
        return Keystream.for_tests(f"{test_seed} sampling")
    return Keystream.shared(from_main(new_key))


@torch.no_grad()
def copy_from_main(model: nn.Module) -> None:
    """Give every process the main one's weights: a head that each drew for itself would make two models."""
    if PartialState().num_processes > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            torch.distributed.broadcast(tensor, src=0)
