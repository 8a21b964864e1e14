"""One private step: clip -> sum -> noise -> ledger -> gather over ranks -> divide, in that order, here and nowhere
else.

A logical step is any number of micro-batches (`backward`), then one `finish`, which writes the private gradient to
`.grad` for an ordinary optimizer. `PlainStep` has the same face without clipping and noise, so that the two can be
compared.

P: all trainable parameters, flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp
from types import TracebackType

import torch
from torch import Tensor, nn

from dptune._validate import InvalidArgument, refuse
from dptune.clipping import add_clipped_sum, clip_factors, per_example_norms
from dptune.ledger import Ledger
from dptune.lora import trainable_parameters
from dptune.mechanism import PrivacyConfig
from dptune.noise import GaussianNoise
from dptune.per_example import PerExampleGradients
from dptune.ranks import Gather, Reduce, sum_over_ranks


@dataclass(frozen=True)
class MicroBatchStats:
    """What one rank saw in one micro-batch. NOT private: for diagnostics only.

    Attributes:
        losses: one an example, [B].
        norms: per-example gradient norms before clipping, [B]; empty in a plain step.
    """

    losses: Tensor
    norms: Tensor


class PrivateStep:
    """Turns backward passes into private gradients. Use it as a context manager around the training loop.

    Args:
        model: its trainable parameters are what the bound covers; must be the same on every rank.
        config: the mechanism.
        ledger: where each step is recorded before its gradient is used; required on rank 0, ignored on the others.
        noise: this rank's noise, by default keyed from the operating system.
        gather, rank, world_size: how ranks meet (`accelerator.gather`); not needed for one process.
        reduce: sums over ranks in the place of `gather` (`accelerator.reduce`), which sends less with many ranks.
        loss_scale: what losses are multiplied by before and gradients divided by after the backward pass, so that
            gradients do not vanish in an fp16 base. A power of two: neither changes anything else. A constant: a
            scale that follows the data would couple examples.

    Raises:
        InvalidArgument: nothing to train, a layer type without a per-example rule, or a scale that is no power of two.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PrivacyConfig,
        *,
        ledger: Ledger | None,
        noise: GaussianNoise | None = None,
        gather: Gather | None = None,
        reduce: Reduce | None = None,
        rank: int = 0,
        world_size: int = 1,
        loss_scale: float = 1.0,
    ) -> None:
        if rank == 0 and ledger is None:
            raise InvalidArgument("ledger=None: rank 0 must record every step; pass dptune.Ledger(path)")
        if world_size > 1 and gather is None and reduce is None:
            raise InvalidArgument(f"gather=None: {world_size} processes need one; pass accelerator.gather")
        if not (loss_scale > 0 and frexp(loss_scale)[0] == 0.5):
            refuse("loss_scale", loss_scale, "must be a power of two, such as 4096: dividing by another one rounds")
        self.config = config
        self._ledger = ledger if rank == 0 else None
        self._gather, self._reduce, self._world_size = gather, reduce, world_size
        self._loss_scale = loss_scale
        self._recorder = PerExampleGradients(model)
        self._slices = _slices(self._recorder.parameters)
        self._sum_P = _flat_zeros(self._recorder.parameters)
        self.noise = noise or GaussianNoise(len(self._sum_P))
        if self.noise.size != len(self._sum_P):  # a vector of one value would be broadcast: the same noise everywhere
            refuse("noise", self.noise.size, f"its size must be the {len(self._sum_P)} trainable parameters")

    def __enter__(self) -> PrivateStep:
        self._recorder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.__exit__(kind, error, trace)
        self.noise.close()

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1) -> MicroBatchStats:
        """Run the backward pass of one micro-batch and `collect` it.

        Args:
            losses: one an example, [B], each depending on that example alone; B examples in every trainable layer.
            rows_per_unit: how many neighbouring rows belong to one privacy unit; see `collect`.
        """
        _require_losses(losses, rows_per_unit)
        try:
            (losses.sum() * self._loss_scale).backward()
        except BaseException:
            self._recorder.take()  # out of memory, say: a retry must find the recorder empty
            raise
        return self.collect(losses, rows_per_unit=rows_per_unit)

    def collect(self, losses: Tensor, *, rows_per_unit: int = 1) -> MicroBatchStats:
        """Clip what the last backward pass recorded, and add it to the step's sum.

        For loops in which somebody else calls `backward()`, on `losses.sum()` times the loss scale. All of it counts
        or, if an error is raised, nothing, so that a micro-batch that did not fit in memory can be tried again.

        Args:
            losses: what the backward pass was for, [B].
            rows_per_unit: k rows in a row are one privacy unit, such as an author: their gradients are summed and
                then clipped once. Fill a unit of fewer with rows without labels; scale its losses for their mean.
        """
        _require_losses(losses, rows_per_unit)
        grads = self._recorder.take()
        if not grads:
            raise RuntimeError("no per-example gradient was recorded: run the forward pass inside `with step:`")
        if rows_per_unit > 1:
            grads = {name: grad.unflatten(0, (-1, rows_per_unit)).sum(1) for name, grad in grads.items()}
        norms = per_example_norms(grads) / self._loss_scale
        if len(norms) * rows_per_unit != len(losses):
            raise RuntimeError(f"{len(losses)} losses but {len(norms)} examples in the trainable layers' inputs")
        factors = clip_factors(norms, self.config.clip_norm) / self._loss_scale
        add_clipped_sum(self._sum_P, self._slices, grads, factors)
        return MicroBatchStats(losses.detach(), norms)

    def finish(self) -> None:
        """Noise the sum, record the step, sum over ranks, divide by the expected batch size, write `.grad`.

        A step whose draw was empty is finished like any other: noise alone.
        """
        noise_P = self.noise.take().to(self._sum_P.device)
        noisy_P = self._sum_P.add_(noise_P, alpha=self.config.noise_std_per_rank(self._world_size))
        if self._ledger is not None:
            # Before the gather: without rank 0's share no rank has the gradient, so none uses it unrecorded.
            self._ledger.record(
                noise_multiplier=self.config.noise_multiplier,
                sampling_probability=self.config.sampling_probability,
                clip_norm=self.config.clip_norm,
            )
        total_P = sum_over_ranks(noisy_P, world_size=self._world_size, gather=self._gather, reduce=self._reduce)
        mean_P = total_P / self.config.divisor
        for name, parameter in self._recorder.parameters.items():
            parameter.grad = mean_P[self._slices[name]].view_as(parameter).to(parameter.dtype)
        self._sum_P.zero_()


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
        self._fresh = True

    def __enter__(self) -> PlainStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, losses: Tensor) -> MicroBatchStats:
        """Add one micro-batch's gradients to `.grad`: all of them or, if an error is raised, none."""
        self._start()
        grads = torch.autograd.grad(losses.sum() * self._loss_scale, self._parameters, allow_unused=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if grad is not None:
                assert parameter.grad is not None
                parameter.grad += grad
        return MicroBatchStats(losses.detach(), losses.new_empty(0))

    def finish(self) -> None:
        """Sum over ranks and divide by the expected batch size."""
        self._start()
        flat_P = torch.cat([parameter.grad.flatten() for parameter in self._parameters if parameter.grad is not None])
        total_P = sum_over_ranks(flat_P, world_size=self._world_size, gather=self._gather, reduce=self._reduce)
        mean_P = total_P / (self._expected_batch_size * self._loss_scale)
        start = 0
        for parameter in self._parameters:
            parameter.grad = mean_P[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self._fresh = True

    def _start(self) -> None:
        if self._fresh:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
            self._fresh = False


def _require_losses(losses: Tensor, rows_per_unit: int) -> None:
    if losses.ndim != 1:
        raise InvalidArgument(
            f"losses of shape {tuple(losses.shape)}: give one loss an example, [B]; a mean over the micro-batch "
            "couples examples and voids the bound (dptune.CausalLMLoss gives them)"
        )
    if len(losses) % rows_per_unit:
        refuse("rows_per_unit", rows_per_unit, f"must divide the {len(losses)} rows; fill units with empty rows")


def _slices(parameters: dict[str, nn.Parameter]) -> dict[str, slice]:
    """Where each parameter stands in the flat vector, in the model's order."""
    slices, start = {}, 0
    for name, parameter in parameters.items():
        slices[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return slices


def _flat_zeros(parameters: dict[str, nn.Parameter]) -> Tensor:
    """A float32 (or better) accumulator for all parameters together."""
    if not parameters:
        raise InvalidArgument("model: has no trainable parameter; add adapters with dptune.add_lora")
    first = next(iter(parameters.values()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.zeros(sum(parameter.numel() for parameter in parameters.values()), dtype=dtype, device=first.device)
