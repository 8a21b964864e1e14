"""One private step: clip -> sum -> noise -> ledger -> sum over ranks -> divide. Only this file does so, in this order.

A logical step is any number of micro-batches (`backward`), then one `finish`, which writes the private gradient to
`.grad` for an ordinary optimizer. `dptune.plain_step` has the same interface without privacy.

Shapes: B examples; P all trainable parameters, flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp
from types import TracebackType

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune.bands import Bands
from dptune.clipping import Clipper, whole_norms
from dptune.clipping_styles import Adaptive
from dptune.correlated_noise import CorrelatedNoise
from dptune.fed_items import FedItems
from dptune.flat import released_size
from dptune.ledger import Ledger
from dptune.mechanism import PrivacyConfig
from dptune.micro_batch import Items, MicroBatchStats, require_losses
from dptune.noise import GaussianNoise
from dptune.per_example import HalfAdded, PerExampleGradients, Recorded, full_precision
from dptune.per_example.fixed_values import SMALL, FixedValues
from dptune.ranks import Gather, Reduce
from dptune.sampling import PoissonSampler
from dptune.sharded_sum import ShardedSum
from dptune.sharding import are_sharded, local_part
from dptune.step_sums import StepSum, WholeSum


class PrivateStep:
    """Turns backward passes into private gradients. Use it as a context manager around the training loop.

    Args:
        model: must be the same on every rank. The guarantee covers its trainable parameters.
        config: the mechanism.
        ledger: records each step before its gradient is used; required on rank 0, ignored on other ranks.
        noise: this rank's independent noise; by default keyed from the operating system. With noise bands, the step
            correlates it, beginning anew.
        gather: stacks the ranks' values (`accelerator.gather`); not needed for one process.
        rank: this process's number.
        world_size: number of processes.
        reduce: sums over ranks instead of `gather` (`accelerator.reduce`), which sends less with many ranks.
        sampler: makes the draws, the same on every rank. Each step must be fed the oldest draw that no step has used,
            named by `items` of `backward`. Its settings must be the configuration's. Without a sampler the ledger says
            so, and the report states no guarantee. With noise bands it must be new, and serves this step alone.
        keep_whole_sum: with sharded trained weights, see `ShardedSum`.
        bands: the coefficients of the noise bands, the same on every rank. By default each rank computes those of the
            configuration, which may differ slightly between machines of several kinds.
        loss_scale: losses are multiplied by it before the backward pass, and gradients divided by it afterwards. So
            gradients do not vanish in an fp16 base. It must be a power of two, which adds no rounding, and constant,
            because a scale that follows the data would couple examples.

    Attributes:
        finished: number of steps that `finish` has released.

    Raises:
        InvalidArgument: nothing is trainable, a trainable layer has no per-example rule, or an argument does not fit.
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
        sampler: PoissonSampler | None = None,
        loss_scale: float = 1.0,
        keep_whole_sum: bool = False,
        bands: Bands | None = None,
    ) -> None:
        if rank not in range(world_size):
            refuse("rank", rank, f"must be from 0 to {world_size - 1}, below world_size")
        if rank == 0 and ledger is None:
            refuse("ledger", None, "rank 0 must record every step; pass dptune.Ledger(path)")
        if rank == 0 and ledger is not None and ledger.group_size != config.group_size:
            remedy = f"the configuration says {config.group_size}; open it with Ledger(path, group_size=...)"
            refuse("ledger", f"{ledger.path} with a group size of {ledger.group_size}", remedy)
        if world_size > 1 and gather is None and reduce is None:
            refuse("gather", None, f"{world_size} processes need one; pass accelerator.gather")
        if sampler is not None:
            config.require_sampler(sampler)
        if not (loss_scale > 0 and frexp(loss_scale)[0] == 0.5):
            refuse("loss_scale", loss_scale, "must be a power of two, such as 4096: other scales add rounding errors")
        self.config = config
        self.clip_norm = self._last_clip_norm = config.clip_norm  # of the current step, and of the last
        self._ledger = ledger if rank == 0 else None
        self._loss_scale = loss_scale
        self._recorder = PerExampleGradients(model)
        self._clipper = Clipper(config.clipping, self._recorder.parameters)
        size, parameters = released_size(model, config, rank), self._recorder.parameters
        self._sums: StepSum
        if are_sharded(parameters.values()):
            counts = isinstance(config.clipping, Adaptive)
            self._sums = ShardedSum(parameters, counts=counts, keep_whole=keep_whole_sum)
        else:
            self._sums = WholeSum(parameters, size, gather=gather, reduce=reduce, world_size=world_size)
        self.finished = 0
        self._has_begun = self._is_looked_at = self._is_spoiled = self._is_half_added = False
        independent = noise or GaussianNoise(size, device=self._device)
        if independent.size != size:
            refuse("noise", independent.size, f"its size must be the {size} values that a step releases")
        are_correlated, bands = config.noise_bands > 1, bands or config.bands
        if bands.count != config.noise_bands:
            refuse("bands", bands.count, f"the configuration has {config.noise_bands} noise bands; give as many")
        self.noise = CorrelatedNoise(independent, bands) if are_correlated else independent
        self._block = self._ledger.begin_block() if are_correlated and self._ledger is not None else 0
        key = self.noise.keystream.kind
        self._fed = FedItems(sampler, noise_key=key, gather=gather, reduce=reduce, world_size=world_size)
        if sampler is not None:
            sampler._begin()

    def __enter__(self) -> PrivateStep:
        self._recorder.__enter__()
        self._fixed = FixedValues(self._recorder.model, self._is_small_and_frozen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.__exit__(kind, error, trace)
        self.noise.close()

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1, items: Items | None = None) -> MicroBatchStats:
        """Run the backward pass of one micro-batch and `collect` its gradients.

        Args:
            losses: one loss per example, [B], each from that example alone. Every trainable layer must see B examples.
            rows_per_unit: number of neighbouring rows that belong to one privacy unit; see `collect`.
            items: the drawn numbers of the micro-batch's units; see `collect`.
        """
        require_losses(losses, rows_per_unit)
        try:
            (losses.sum() * self._loss_scale).backward()
        except BaseException:
            self._recorder.take()  # a retry, for example after running out of memory, needs an empty recorder
            raise
        return self.collect(losses, rows_per_unit=rows_per_unit, items=items)

    def collect(self, losses: Tensor, *, rows_per_unit: int = 1, items: Items | None = None) -> MicroBatchStats:
        """Clip the gradients that the last backward pass recorded, and add them to the step's sum.

        For loops in which other code calls `backward()`, on `losses.sum()` times the loss scale. If an error is raised,
        nothing was added, so a micro-batch that did not fit in memory can be tried again. The exception is `HalfAdded`
        (whole models that run out of memory in the last part), after which the step is lost.

        Args:
            losses: the losses of that backward pass, [B].
            rows_per_unit: k. Every k neighbouring rows are one privacy unit, such as an author: their gradients are
                summed, and the sum is clipped once. Fill up smaller units with rows without labels. For the mean over
                a unit, scale its losses.
            items: the numbers, in the sampler's draw, of the units in the micro-batch; required with a sampler. If
                there are more units than numbers, the rest only fills up the micro-batch and adds nothing.

        Raises:
            RuntimeError: nothing was recorded, the number of losses is not the number of recorded examples, or the
                items are missing or too many.
        """
        require_losses(losses, rows_per_unit)
        recorded = self._recorder.take()
        if not recorded:
            raise RuntimeError("no per-example gradient was recorded: run the forward pass inside `with step:`")
        if not self._is_looked_at:  # once per step
            self._recorder.require_nothing_else(losses)
            self._is_looked_at = True
        with full_precision(losses.device):
            return self._add(recorded.folded(rows_per_unit), losses.detach(), rows_per_unit, items)

    def _add(self, recorded: Recorded, losses: Tensor, rows_per_unit: int, items: Items | None) -> MicroBatchStats:
        """Measure, clip and add."""
        groups = self._clipper.groups
        squared_norms = _scaled(recorded.squared_norms(groups), self._loss_scale**-2)
        norms = whole_norms(squared_norms)
        if len(norms) * rows_per_unit != len(losses):
            raise RuntimeError(f"{len(losses)} losses but {len(norms)} examples in the trainable layers' inputs")
        factors = self._clipper.factors(squared_norms, self.clip_norm)
        clipped = torch.stack([*factors.values()]).lt(1).any(0)
        factors = _scaled(factors, 1 / self._loss_scale)
        named = self._fed.named(items, len(norms))
        if items is not None and len(items) < len(norms):
            counts = torch.arange(len(norms), device=norms.device) < len(items)
            factors = {name: own * counts for name, own in factors.items()}
            norms = norms.where(counts, 0)  # also of a row that overflowed
        stats, count = MicroBatchStats(losses, norms, clipped), self._count(norms)
        sums, weights = self._begun(), {name: factors[group] for name, group in groups.items() if group in factors}
        self._is_spoiled = True  # until the whole micro-batch is added and counted; an interrupt may come anywhere
        try:
            sums.add(recorded, weights)
        except HalfAdded:
            self._is_half_added = True
            raise
        except (RuntimeError, MemoryError):  # before anything was added, see `StepSum.add`
            self._is_spoiled = False
            raise
        if count is not None:
            sums.add_count(count)
        self._fed.add(named)
        self._is_spoiled = False
        return stats

    def add_nothing(self) -> None:
        """Take part in the sum of a micro-batch whose pass failed on this rank, so that no other rank waits for it.

        Ranks with sharded trained weights send each other their sums after every pass. Each rank then calls this, or
        `backward`, equally often. After `HalfAdded` this ends that sum, and the step stays lost.
        """
        (self._sums if self._is_half_added else self._begun()).add_nothing()

    def _count(self, norms: Tensor) -> Tensor | None:
        """What adaptive clipping adds to its count for one micro-batch, scaled like the gradients; None without it."""
        if not isinstance(self.config.clipping, Adaptive):
            return None
        return self.config.count_scale(self.clip_norm) * _unclipped_over_half(norms, self.clip_norm)

    def finish(self) -> None:
        """Add noise to the sum, record the step, sum over ranks, divide by the expected batch size, write `.grad`.

        A step with an empty draw is finished like any other, and releases noise alone. `.grad` stays until the next
        step begins. If the step's draw was used and an error or an interrupt followed, the step is lost, and no other
        step can follow: resume from a checkpoint.

        Raises:
            RuntimeError: what was fed is not the sampler's draw. The step is lost.
            InvalidArgument: a parameter that is not recorded has a gradient, a buffer of the model has changed, or the
                ledger cannot record the step.
        """
        sums = self._begun()
        self._refuse_other_gradients()
        self._fixed.require_unchanged()
        self._is_spoiled = True  # until its gradient is written: a draw is used once
        self._fed.require_draw(self._device)
        noisy = sums.taken()
        self._add_noise(noisy)
        with sums.agreed():
            self._record()
        total = sums.over_ranks(noisy)
        self._last_clip_norm = self.clip_norm
        self._adapt_clip_norm(total)
        total /= self.config.divisor
        for name, mean in sums.gradients(total).items():
            self._recorder.parameters[name].grad = mean
        self.finished += 1
        self._has_begun = self._is_looked_at = self._is_spoiled = False

    def gradient_noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the last step's gradient."""
        independent = self.config.noise_std_per_rank(1, self._last_clip_norm) / self.config.divisor
        return independent * self.noise.relative_std

    def state_dict(self) -> dict[str, float]:
        """The state that a resumed run needs: the clip norm of the next step."""
        return {"clip_norm": self.clip_norm}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resume from `state_dict()`."""
        self.clip_norm = state["clip_norm"]

    def _begun(self) -> StepSum:
        """The step's sum so far."""
        if self._is_spoiled:
            raise RuntimeError("an earlier error left this step half done, so it is lost; resume from a checkpoint")
        if not self._has_begun:
            for parameter in self._recorder.parameters.values():
                parameter.grad = None
            self._sums.begin()
            self._has_begun = True
        return self._sums

    @property
    def _device(self) -> torch.device:
        return local_part(next(iter(self._recorder.parameters.values()))).device

    def _refuse_other_gradients(self) -> None:
        for name, parameter in self._recorder.model.named_parameters():
            if parameter.grad is not None and name not in self._recorder.parameters:
                remedy = (
                    "has a gradient without clipping and noise; set it to None, and freeze it before making the step"
                )
                refuse(name, f"of shape {tuple(parameter.shape)}", remedy)

    def _is_small_and_frozen(self, name: str, parameter: nn.Parameter) -> bool:
        return name not in self._recorder.parameters and parameter.numel() <= SMALL

    def _add_noise(self, sums: Tensor) -> None:
        std = self.config.noise_std_per_rank(self._sums.noises, self.clip_norm)
        self.noise.add_to(sums, std, grid=self.config.grid(self.clip_norm))

    def _record(self) -> None:
        """Write the step into the ledger, before any rank has its gradient."""
        if self._ledger is not None:
            self._ledger.record(
                noise_multiplier=self.config.noise_multiplier,
                sampling_probability=self.config.sampling_probability,
                clip_norm=self.clip_norm,
                sampler=self._fed.sampler_name,
                noise_key=self._fed.noise_key,
                cut=self.config.cut,
                noise_bands=self.config.noise_bands,
                block=self._block,
            )

    def _adapt_clip_norm(self, total: Tensor) -> None:
        if isinstance(self.config.clipping, Adaptive):
            surplus = self._sums.count(total) / self.config.count_scale(self.clip_norm)
            share = surplus / self.config.divisor + 0.5
            self.clip_norm = self.config.clipping.next_clip_norm(self.clip_norm, share)


def _scaled(values: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: value * by for name, value in values.items()} if by != 1 else dict(values)


def _unclipped_over_half(norms_B: Tensor, clip_norm: float) -> Tensor:
    """Sum over examples: 1/2 if the example is not clipped, -1/2 if it is clipped.

    An example without a gradient, such as the dummy of a rank without examples, counts 0.
    """
    return (norms_B.le(clip_norm).to(norms_B.dtype) - 0.5).where(norms_B != 0, torch.zeros_like(norms_B)).sum()
