"""Keeps ranks with sharded weights in step when memory runs out on one of them.

FSDP gathers a layer's weights when the layer computes, and a gather ends only when every rank makes it. A rank that
runs out of memory in the middle of a pass leaves the others waiting in the next gather. Here it makes the rest of that
pass's gathers without computing, so that the others end their pass.

Why no rank waits forever:

- A pass communicates by gathers alone: nothing is reduced in it. That holds for frozen shards, and for trained shards
  in a private step. Which gathers a pass makes, and in which order, follows from the model's modules, not from the
  rows. All ranks make the same passes in the same order.
- After a private pass, ranks with trained shards send each other their sums. A rank whose pass failed first
  makes the gathers that are left, and then sends zeros (`PrivateStep.add_nothing`). This works until the first sum of a
  pass has been sent. If memory runs out later, the others already have a part of this rank's sums. The step is then
  lost (`HalfAdded`), and the launch ends.
- The first pass that ends is remembered. From then on a rank that fails after k gathers knows those that are left.
- A gather counts when the call has returned. Memory that runs out before it, or after it, is counted right. An error
  inside the call itself, or of the communication, is not survived: the rank fails and its launcher ends the others.
- Making the gathers takes memory for one layer at a time, and sending zeros for one parameter at a time. The remembered
  pass took more, and what the failed pass held has been freed. Should it run out all the same, the rank fails, and its
  launcher ends the others.

If a model's passes gather in different orders, a rank cannot catch up: `Gathers.can_catch_up` is False. Nor can it
without privacy if the trained weights are sharded, because then FSDP reduces their gradients in the pass.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor

_T = TypeVar("_T")


class Gathers:
    """The gathers of a sharded model's weights, in the order of a pass.

    Args:
        model: the root of the sharded model. Every rank makes one of these, before the first recorded pass.
        private: whether all passes are those of private steps, in which FSDP reduces no gradient.

    Attributes:
        is_steady: whether, as far as known, every pass makes the same gathers and communicates in no other way.
    """

    def __init__(self, model: nn.Module, *, private: bool) -> None:
        self._model = model
        self._of_pass: list[FSDPModule] | None = None  # those of every pass
        self._made: list[FSDPModule] = []  # in the current pass
        self.is_steady = private or not any(p.requires_grad and isinstance(p, DTensor) for p in model.parameters())
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._sharded:
            module.set_custom_all_gather(_Noted(self, module))

    @property
    def can_catch_up(self) -> bool:
        """Whether a rank that fails in the current pass can make the rest of its gathers."""
        return self.is_steady and self._of_pass is not None

    def begin(self) -> None:
        """Call this before each pass in which memory may run out."""
        for module in self._sharded:  # an evaluation leaves the root group gathered
            module.reshard()
        self._made = []

    def end(self) -> None:
        """Call this after a pass that did not fail."""
        if self._of_pass is None:
            self._of_pass = list(self._made)
        self.is_steady = self.is_steady and self._made == self._of_pass

    def catch_up(self) -> None:
        """Make the gathers that are left of a failed pass. The model is then ready for the next pass.

        Raises:
            RuntimeError: it is not known which are left; see `can_catch_up`.
        """
        if not self.can_catch_up or self._of_pass is None:
            raise RuntimeError("a pass failed, and it is not known which gathers of weights are left of it")
        left = self._of_pass[len(self._made) :]
        _begin_anew(self._model)
        for module in left:
            module.unshard()
            module.reshard()

    def note(self, module: FSDPModule, gather: Callable[[], dist.Work | None]) -> dist.Work | None:
        """Make a gather and count it."""
        was_steady, self.is_steady = self.is_steady, False  # an error inside the call leaves it unknown
        work = gather()
        self.is_steady = was_steady
        self._made.append(module)
        return work


class _Noted(DefaultAllGather):
    """FSDP's own gather of one module's weights, counted."""

    def __init__(self, gathers: Gathers, module: FSDPModule) -> None:
        self._gathers, self._module = gathers, module

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        gather = super().__call__
        return self._gathers.note(self._module, lambda: gather(output_tensor, input_tensor, group, async_op))


def unless_out_of_memory(work: Callable[[], _T], device: torch.device, gathers: Gathers | None = None) -> _T | None:
    """The result of a forward and backward pass, or None if memory ran out in it; its memory is then free again.

    Args:
        work: the pass. An error in it must leave nothing behind. `HalfAdded` passes through.
        device: where it computes.
        gathers: of a sharded model whose other ranks make the same pass. If this rank can, it catches up with them.
    """
    if gathers is not None:
        gathers.begin()
    done = _attempt(work)
    if done is None:
        gc.collect()
        if empty_cache := getattr(torch.get_device_module(device), "empty_cache", None):
            empty_cache()
        if gathers is not None and gathers.can_catch_up:
            gathers.catch_up()
    elif gathers is not None:
        gathers.end()
    return done


def _attempt(work: Callable[[], _T]) -> _T | None:
    """None if memory ran out. Returning frees the exception, and the tensors that its traceback held."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, dist.DistError) or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        return None


def _begin_anew(model: nn.Module) -> None:
    """Make FSDP forget a pass that failed: every module is sharded and idle again."""
    if not isinstance(model, FSDPModule):
        return
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
        return
    state = model._get_fsdp_state()  # torch before 2.13: what ends every backward pass ends this one
    gathered, state._comm_ctx.all_gather_state = state._comm_ctx.all_gather_state, None
    if gathered is not None and gathered.event is not None:
        state._device_handle.current_stream().wait_event(gathered.event)
    state._state_ctx.iter_forward_root = None
    state._root_post_backward_final_callback()
