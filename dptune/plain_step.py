"""A step without privacy, for comparison: `PrivateStep`'s interface, ordinary autograd, and the same divisor."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune.flat import views
from dptune.lora import trainable_parameters
from dptune.micro_batch import Items, MicroBatchStats, require_losses
from dptune.noise import GaussianNoise
from dptune.ranks import Gather, Reduce, sum_over_ranks
from dptune.sharding import are_sharded


class PlainStep:
    """`PrivateStep` without privacy: no clipping, no noise, ordinary autograd; same sampling, same divisor."""

    noise: GaussianNoise | None = None

    def __init__(
        self,
        model: nn.Module,
        expected_batch_size: float,
        *,
        gather: Gather | None = None,
        reduce: Reduce | None = None,
        world_size: int = 1,
        loss_scale: float = 1.0,
    ) -> None:
        self._parameters = trainable_parameters(model)
        self._expected_batch_size = expected_batch_size
        self._gather, self._reduce, self._world_size = gather, reduce, world_size
        self._loss_scale = loss_scale
        self.finished = 0
        self._fresh, self._is_sharded = True, are_sharded(self._parameters)

    def __enter__(self) -> PlainStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1, items: Items | None = None) -> MicroBatchStats:
        """Add the gradients of one micro-batch, losses [B], to `.grad`. If an error is raised, nothing was added.

        With sharded parameters an error ends the run.

        `rows_per_unit` and `items` change nothing, because nothing is clipped or accounted.
        """
        del items
        require_losses(losses, rows_per_unit)
        self._start()
        scaled = losses.sum() * self._loss_scale
        if self._is_sharded:
            scaled.backward()  # FSDP adds the mean over ranks to the shards' `.grad`
        else:
            grads = torch.autograd.grad(scaled, self._parameters, allow_unused=True)
            for parameter, grad in zip(self._parameters, grads, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return MicroBatchStats(losses.detach(), losses.new_empty(0), losses.new_empty(0))

    def add_nothing(self) -> None:
        """Nothing: see `PrivateStep.add_nothing`. Ranks meet in `finish` alone, unless the parameters are sharded."""

    def finish(self) -> None:
        """Sum over ranks and divide by the expected batch size."""
        self._start()
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._parameters]
        divisor = self._expected_batch_size * self._loss_scale
        if self._is_sharded:
            divisor /= self._world_size
        elif self._world_size > 1:
            flat_P = torch.cat([grad.flatten() for grad in grads])
            sum_over_ranks(flat_P, world_size=self._world_size, gather=self._gather, reduce=self._reduce)
            grads = list(views(dict(enumerate(self._parameters)), flat_P).values())
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad.div_(divisor)
        self.finished += 1
        self._fresh = True

    def gradient_noise_std(self) -> float:
        """0, because there is no noise."""
        return 0.0

    def state_dict(self) -> dict[str, float]:
        """Empty: this step has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resume from `state_dict()`, which must be empty."""
        if state:
            refuse("state", dict(state), "is the state of a private step, but this step has no privacy; give {}")

    def _start(self) -> None:
        if self._fresh:
            for parameter in self._parameters:
                parameter.grad = None
            self._fresh = False
