"""Makes a plain Trainer private: its data set, its loss, and what the callback does at each of the Trainer's events.

`PrivacyEngine.dataset` ignores which items the Trainer's sampler asks for: the micro-batches of a logical step together
are one Poisson draw. `PrivacyEngine.loss` gives the sum of per-example losses, and the backward pass reveals whether
anything scaled it. Settings that do not fit together are refused before any weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dptune._validate import Described, refuse, renamed
from dptune.clipping_styles import FLAT, Clipping
from dptune.integrations.arguments import averaging_of_trainer, updates_identity
from dptune.integrations.checks import (
    LessThanFloat32,
    refuse_shards,
    refuse_unsafe_arguments,
    require_public_choices,
    rounds_by_shape,
)
from dptune.integrations.draws import Collator, Examples, PoissonMicroBatches
from dptune.integrations.items import check_on_random_items, longest_of, make_of_first
from dptune.integrations.losses import losses_of_outputs
from dptune.integrations.planning import count_examples, logical_batch, plan_training, unit_of
from dptune.integrations.privacy_arguments import FLAGS, PrivacyArguments
from dptune.integrations.processes import ranks_of_launch
from dptune.integrations.publishing import publish_run, with_recipe
from dptune.integrations.state import read_privacy_state, save_privacy_state
from dptune.integrations.values import require_known_values
from dptune.per_example.quantized import require_separate_rounding
from dptune.report.fields import NO_FIELDS, CardFields
from dptune.run.identity import num_trained
from dptune.run.lock import FolderLock
from dptune.run.plan import RunPlan
from dptune.run.plan_lines import describe_noise, describe_plan
from dptune.run.session import PrivateRun
from dptune.step import PrivateStep
from dptune.units.unit import Unit

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

OutputLosses = Callable[[Any, Any, Tensor | None], Tensor]  # (model, outputs, labels) -> losses [B]
_NOBODY = np.array([], dtype=np.int64)


class PrivacyEngine:
    """Makes one plain Trainer private: give the Trainer its `dataset`, its `loss` and a `PrivacyEngineCallback`.

    Args:
        model: the Trainer's model.
        args: the Trainer's arguments, with `max_grad_norm=0`, for one process. The expected logical batch size is
            per_device_train_batch_size x gradient_accumulation_steps.
        train_dataset: the training set; each item is one privacy unit.
        privacy_args: all other settings that decide epsilon.
        losses: (model, outputs, labels) -> losses [B]; by default those of `DPTrainer`.
        privacy_unit: see `DPTrainer`.
        clipping: the clipping style.
        max_length: maximum tokens of an item; see `DPTrainer`.
        card: what the model card says besides the guarantee.

    Raises:
        InvalidArgument: a setting would break the guarantee; the message says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Examples,
        privacy_args: PrivacyArguments,
        *,
        losses: OutputLosses = losses_of_outputs,
        privacy_unit: str | Unit | None = None,
        clipping: Clipping = FLAT,
        max_length: int | None = None,
        card: CardFields = NO_FIELDS,
    ) -> None:
        if privacy_args.disable_dp:
            refuse("--disable_dp", True, "leave the callback out, or use DPTrainer for the same sampling")
        _refuse_unsafe(args)
        refuse_shards(model)
        num_examples = count_examples(train_dataset)
        batch = logical_batch(args, num_examples)
        per_epoch = -(-num_examples // batch)
        self.model, self._losses, self._privacy_args = model, losses, privacy_args
        self._max_length, self._args = max_length, args
        self._updates = updates_identity(args)
        self._card = with_recipe(card, args, privacy_args)
        self._parts, self._micro_batch_size = args.gradient_accumulation_steps, args.per_device_train_batch_size
        self.plan: RunPlan = plan_training(
            privacy_args,
            num_examples=num_examples,
            batch=batch,
            steps=_trainer_steps(args, per_epoch),
            unit=unit_of(privacy_unit, train_dataset),
            clipping=clipping,
        )
        self.dataset = PoissonMicroBatches(
            train_dataset,
            parts=self._parts,
            micro_batch_size=self._micro_batch_size,
            steps_per_epoch=per_epoch,
        )
        self._run: PrivateRun | None = None
        self._lock = FolderLock()
        self._seen: Tensor | None = None  # losses of the last forward pass
        self._scales: list[float] = []  # the factors by which the Trainer scaled them
        self._collected = 0

    @property
    def epsilon(self) -> float | None:
        """Epsilon spent so far; None before the first step."""
        return self._run.epsilon if self._run is not None else None

    def loss(self, outputs: object, labels: Tensor | None, **_: object) -> Tensor:
        """Pass this to the Trainer as `compute_loss_func`.

        Returns:
            A scalar. In evaluation it is the mean of the losses. In training its gradient is that of their sum, and its
            value is that sum divided by the expected batch size, so the Trainer logs approximately their mean.
        """
        losses = self._losses(self.model, outputs, labels)
        if not torch.is_grad_enabled():
            return losses.mean()
        handed = self.dataset.handed
        if handed and not len(handed[0]):
            losses = losses * 0.0  # this row only stands for an empty micro-batch
        self._seen, self._scales = losses, []
        total = losses.sum()
        total.register_hook(lambda grad: self._scales.append(grad.item()))
        return total.detach() / self.plan.expected_batch_size + (total - total.detach())

    def note_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Remember the settings of the caller's own optimizer, before the Trainer restores those of a checkpoint."""
        self._updates = updates_identity(self._args, optimizer)

    def begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, train_dataloader: DataLoader[object]
    ) -> None:
        """Check the Trainer, open the run and start recording per-example gradients.

        Raises:
            InvalidArgument: the Trainer does not fit this engine, or the budget is already spent.
        """
        _refuse_unsafe(args)
        require_public_choices(args, self._privacy_args)
        require_separate_rounding(model)
        if rounds_by_shape(model, args):
            self._refuse_rounding()
        self._check_trainer(args, state, model, train_dataloader)
        known = self._losses is losses_of_outputs
        examples = self.dataset.examples
        longest = longest_of(model, make_of_first(examples), self._max_length)
        require_known_values(model, examples, train_dataloader.collate_fn, labels=known, longest=longest)
        resumed = state.global_step > 0
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}" if resumed else None
        with renamed(FLAGS):
            self._lock.make(Path(args.output_dir))
            saved = None if checkpoint is None else read_privacy_state(checkpoint)
            run = PrivateRun(self.plan, args.output_dir, ranks_of_launch(), resume_from=saved, identity=self._updates)
        if run.last <= run.completed:
            remedy = "is spent: no step is left; use the last checkpoint"
            refuse("--target_epsilon", self._privacy_args.target_epsilon, remedy)
        print(*describe_plan(self.plan), *describe_noise(self.plan, num_trained(model)), sep="\n")
        self._check_rules(train_dataloader.collate_fn)
        run.prepare(model)
        run.__enter__()
        self._run, self._collected = run, 0
        self.dataset.start(run.sampler())
        state.max_steps = run.last

    def begin_step(self) -> None:
        """Call this before the forward passes of a logical step."""
        self._begun.begin_step()

    def collect(self) -> None:
        """Clip the gradients that the Trainer's last backward pass recorded, and add them to the step's sum.

        Raises:
            InvalidArgument: the Trainer used another loss, scaled it, or its collator made another number of rows.
        """
        losses, scales, self._seen = self._seen, self._scales, None
        if losses is None:
            refuse(
                "compute_loss_func", None, "the Trainer's loss is a mean over the micro-batch: pass privacy_engine.loss"
            )
        if scales != [1.0]:
            remedy = "the Trainer must call backward() on it once, unscaled; use a Trainer that does not scale its loss"
            refuse("privacy_engine.loss", f"multiplied by {scales}", remedy)
        handed = self.dataset.handed.popleft() if self.dataset.handed else _NOBODY
        _require_one_row_each(len(losses), max(len(handed), 1))
        self._step.collect(losses, items=handed)
        self._collected += 1

    def finish(self) -> None:
        """Write the private gradient of a logical step to `.grad`.

        Raises:
            InvalidArgument: the Trainer ran another number of micro-batches than `gradient_accumulation_steps`.
        """
        if self._collected != self._parts:
            remedy = "together they are one Poisson draw; use a Trainer that does not shorten steps"
            refuse("gradient_accumulation_steps", self._parts, f"{self._collected} micro-batches in a step: {remedy}")
        self._collected = 0
        self._begun.finish_step()

    def save(self, checkpoint: Path) -> None:
        """Add a copy of the ledger and the run's settings to a checkpoint folder."""
        save_privacy_state(self._begun, checkpoint)

    def end(self, tokenizer: Any = None) -> None:
        """Stop recording, and write what may be published to `output_dir/publish`.

        Args:
            tokenizer: saved beside the model, if there is one.
        """
        try:
            self._begun.close()  # the folder stays locked until all is written
            print(*publish_run(self._begun, self.model, self._card, tokenizer), sep="\n")
        finally:
            self.close()

    def close(self) -> None:
        """Remove the hooks from the model and unlock the folder; also needed after an error."""
        if self._run is not None:
            self._run.close()
        self._lock.release()

    @property
    def _step(self) -> PrivateStep:
        step = self._begun.step
        if not isinstance(step, PrivateStep):
            raise RuntimeError("the callback was called outside of training")
        return step

    @property
    def _begun(self) -> PrivateRun:
        if self._run is None:
            raise RuntimeError("training has not begun")
        return self._run

    def _check_rules(self, collate: Collator) -> None:
        """Compare the engine's gradients with autograd's on random items, before anything is released."""
        device = next(self.model.parameters()).device

        def losses(inputs: Mapping[str, Tensor]) -> Tensor:
            given = {name: value for name, value in inputs.items() if name != "labels"}  # as the Trainer does
            return self._losses(self.model, self.model(**given), inputs.get("labels"))

        def on_device(items: list[object]) -> dict[str, Tensor]:
            inputs = {name: value.to(device) for name, value in collate(items).items()}
            _require_one_row_each(len(next(iter(inputs.values()))), len(items))
            return inputs

        with LessThanFloat32() as rounding:
            check_on_random_items(self.model, losses, on_device, self.dataset.examples, max_length=self._max_length)
        if rounding.seen:
            self._refuse_rounding()

    def _refuse_rounding(self) -> NoReturn:
        remedy = "its rounding would follow the rows drawn beside it; train in float32, or use DPTrainer"
        refuse("model", Described(f"{type(self.model).__name__} in less than float32"), remedy)

    def _check_trainer(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, loader: DataLoader[object]
    ) -> None:
        if model is not self.model:
            refuse("model", type(model).__name__, "is not the one that the PrivacyEngine was made with; pass the same")
        if getattr(loader, "dataset", None) is not self.dataset:
            remedy = "passes over shuffled data are not Poisson sampling; pass train_dataset=privacy_engine.dataset"
            refuse("train_dataset", type(getattr(loader, "dataset", None)).__name__, remedy)
        shape = (args.gradient_accumulation_steps, args.per_device_train_batch_size)
        if shape != (self._parts, self._micro_batch_size):
            refuse("--gradient_accumulation_steps", shape[0], "make the PrivacyEngine with the Trainer's own args")
        batches = self.plan.steps_per_epoch * self._parts
        if len(loader) != batches or state.max_steps != self.plan.steps:
            remedy = f"the engine planned {batches} and {self.plan.steps}: make it with the Trainer's own args"
            refuse("args", f"{len(loader)} batches per epoch and {state.max_steps} steps", remedy)
        if state.global_step > 0 and not args.ignore_data_skip:
            refuse("--ignore_data_skip", False, "a resumed run makes new draws: give --ignore_data_skip")


def _refuse_unsafe(args: TrainingArguments) -> None:
    refuse_unsafe_arguments(args)
    for name, value in averaging_of_trainer(args).identity.items():
        refuse(f"--{name}", value, "a plain Trainer evaluates and saves the last weights: use DPTrainer")
    if args.world_size > 1:
        refuse("torchrun", args.world_size, "a plain Trainer averages gradients before they are clipped: use DPTrainer")
    if args.save_total_limit == 1:
        told = "transformers would delete the older checkpoint before the new one has its copy of the ledger"
        refuse("--save_total_limit", 1, f"{told}; give at least 2, or use DPTrainer")
    if args.dataloader_num_workers:
        refuse("--dataloader_num_workers", args.dataloader_num_workers, "only the main process can draw; give 0")


def _require_one_row_each(rows: int, examples: int) -> None:
    if rows != examples:
        remedy = f"for a micro-batch of {examples} examples: the collator must make one row per example"
        refuse("data_collator", f"{rows} rows", remedy)


def _trainer_steps(args: TrainingArguments, steps_per_epoch: int) -> int:
    """The number of steps, as the Trainer counts them."""
    return int(args.max_steps) if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
