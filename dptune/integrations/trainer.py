"""A transformers Trainer whose gradients are private: Poisson draws, per-example losses, clipping, noise, ledger.

The Trainer keeps its arguments, optimizer and schedule, evaluation, logging and checkpoints. This class replaces
sampling, the loss, gradient accumulation and the model's wrapper for several processes, which would average gradients
before they are clipped. A logical step is one call of `training_step`, so the Trainer's own accumulation is 1.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from dptune._validate import refuse, renamed
from dptune.accounting.rounding import rounded_up_to_figures
from dptune.averaging import describe_averaging
from dptune.clipping_styles import FLAT, Clipping
from dptune.devices import can_pin, computes_apart
from dptune.integrations.arguments import averaging_of_trainer, updates_identity
from dptune.integrations.averaging_trainer import AveragingTrainer
from dptune.integrations.checks import refuse_unsafe_arguments, refuse_unsafe_shards, require_public_choices
from dptune.integrations.draws import (
    Collator,
    Cutter,
    DrawSampler,
    Examples,
    MicroBatch,
    TrainerDraw,
    draw_loader,
)
from dptune.integrations.losses import DefaultLosses, TrainerLosses
from dptune.integrations.planning import count_examples, logical_batch, plan_training, rows_of_each, steps_of, unit_of
from dptune.integrations.privacy_arguments import FLAGS, PrivacyArguments
from dptune.integrations.processes import copy_from_main, ranks_of_launch
from dptune.integrations.publishing import publish_run, with_recipe
from dptune.integrations.sharded_saving import write_sharded
from dptune.integrations.trainer_items import TrainerItems
from dptune.optimizers import DPAdam
from dptune.pass_overhead import pass_overhead
from dptune.report.fields import NO_FIELDS, CardFields
from dptune.run.identity import num_trained
from dptune.run.lock import FolderLock
from dptune.run.plan import RunPlan
from dptune.run.plan_lines import describe_needed_data, describe_noise, describe_plan, describe_register
from dptune.run.session import PrivateRun
from dptune.sharding import reshard
from dptune.units.unit import Unit


class DPTrainer(AveragingTrainer):
    """`transformers.Trainer` with differential privacy.

    The expected logical batch size is per_device_train_batch_size x processes x gradient_accumulation_steps. The number
    of steps is `max_steps`, or `num_train_epochs` divided by the sampling probability. Losses in the log and in
    `trainer_state.json` are not private.

    Micro-batches have fixed shapes, so that an item's rounding does not follow the items beside it. Random items fill
    them up and count as zero.

    A causal model whose weights are sharded with `dptune.sharding.shard` trains in its shards. `train`, `evaluate` and
    `save_model` must then be called by every process.

    Args:
        model: as for the Trainer.
        args: the Trainer's settings, `TrainingArguments` of this module.
        data_collator: as for the Trainer.
        train_dataset: as for the Trainer; must have a length, and each item is one privacy unit.
        **kwargs: further arguments of the Trainer.
        privacy_args: all other settings that decide epsilon.
        losses: (model, inputs of a micro-batch) -> one loss per row, [B], each from that row alone. The default
            handles causal language modelling for labels [B, T] and classification for labels [B].
        rows_per_unit: number of neighbouring rows that the collator makes per item. Their gradients are summed, and
            the sum is clipped once. It may differ per item, int64 [items]; items must then be lists of rows, and the
            collator must fill all items of a micro-batch up to the largest number.
        privacy_unit: what an item is, for the report; an `ItemUnit` with a group size if a unit has several items. By
            default each item is a unit by itself; a training set with a column that names users is then refused.
        clipping: the clipping style.
        max_length: maximum tokens of an item, which must be public. A longer item is refused. By default it is the
            model's context, if that is at most 4,096 tokens. Rows up to this length are tried before training.
        card: what the model card says besides the guarantee.

    Raises:
        InvalidArgument: a setting would break the guarantee; the message says what to change.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: transformers.TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Examples | None = None,
        *,
        privacy_args: PrivacyArguments,
        losses: TrainerLosses | None = None,
        rows_per_unit: int | np.ndarray = 1,
        privacy_unit: str | Unit | None = None,
        clipping: Clipping = FLAT,
        max_length: int | None = None,
        card: CardFields = NO_FIELDS,
        **kwargs: Any,
    ) -> None:
        if args is None:
            refuse("args", None, "give dptune's TrainingArguments")
        if kwargs.get("compute_loss_func") is not None:
            refuse("compute_loss_func", "given", "it gives one loss per micro-batch; pass losses= instead")
        refuse_unsafe_arguments(args)
        self.privacy_args = privacy_args
        self._losses: TrainerLosses = losses or DefaultLosses()
        self._run: PrivateRun | None = None
        self._last_loss = 0.0
        self._num_examples = count_examples(train_dataset) if train_dataset is not None else 0
        protected = None if privacy_args.disable_dp else train_dataset
        self._privacy_unit, self._clipping = unit_of(privacy_unit, protected), clipping
        self._rows_per_unit = rows_of_each(rows_per_unit, self._num_examples)
        self._max_length, self._most_rows = max_length, rows_per_unit if isinstance(rows_per_unit, int) else 2
        # With a fixed number of rows per item, each row counts; otherwise the caller has already averaged them.
        self._losses_per_item = rows_per_unit if isinstance(rows_per_unit, int) else 1
        self._batch = logical_batch(args, self._num_examples) if self._num_examples else 0
        super().__init__(model, self._own_arguments(args), data_collator, train_dataset, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.accelerator.mixed_precision == "fp16":
            refuse("accelerate", self.accelerator.distributed_type.value, "no FSDP, DeepSpeed or fp16: use torchrun")
        refuse_unsafe_shards(self.model, args)
        self._averaging = averaging_of_trainer(args)
        self._updates = updates_identity(self.args, self.optimizer)
        self._card = with_recipe(card, args, privacy_args)
        self.add_callback(_RunCallback(self))

    @functools.cached_property
    def plan(self) -> RunPlan:
        """Sampling, steps and noise; the first use finds the noise multiplier."""
        if not self._batch:
            refuse("train_dataset", None, "give one to train on")
        return plan_training(
            self.privacy_args,
            num_examples=self._num_examples,
            batch=self._batch,
            steps=self.args.max_steps,
            unit=self._privacy_unit,
            clipping=self._clipping,
        )

    @property
    def epsilon(self) -> float | None:
        """Epsilon spent so far; None before the first step, without privacy and on all processes but the main one."""
        return self._run.epsilon if self._run is not None else None

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> TrainOutput:
        """Train, and write what may be published to `output_dir/publish`; with `dry_run`, only print the plan.

        Raises:
            InvalidArgument: the output folder holds another run, or the checkpoint is of another run.
        """
        if trial is not None:
            refuse("trial", "given", "each trial would spend a separate budget; search on public data")
        if self.args.should_log:
            noise = describe_noise(self.plan, num_trained(self.model))
            print(*describe_plan(self.plan), *describe_averaging(self._averaging, self.plan.steps), *noise, sep="\n")
        if getattr(self.args, "dry_run", False):
            if self.args.should_log:
                for line in [*describe_register(self.plan, self.args.output_dir), *describe_needed_data(self.plan)]:
                    print(line)
            return TrainOutput(0, math.nan, {})
        require_public_choices(
            self.args,
            self.privacy_args,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            callbacks=self.callback_handler.callbacks,
        )
        default = isinstance(self._losses, DefaultLosses) or hasattr(self._losses, "of_default_labels")
        self._items.check_values(default_losses=default)
        checkpoint, ranks = self._checkpoint(resume_from_checkpoint), ranks_of_launch()
        with renamed(FLAGS), FolderLock(enabled=ranks.is_main) as lock:
            ranks.from_main(lambda: lock.make(Path(self.args.output_dir)))
            saved = self.saved_run(checkpoint, ranks)
            self._run = run = PrivateRun(
                self.plan, self.args.output_dir, ranks, resume_from=saved, identity=self._updates
            )
            self._average = average = self._begun_average(checkpoint, self.plan.steps)
            try:
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            finally:
                run.close()
            average.put_in()
            self._average = None  # the model has it from now on
            if ranks.is_main:
                told = average.in_words(average.step)
                print(*publish_run(run, self.model, self._card, self._tokenizer, average=told), sep="\n")
            elif self.has_shards:
                write_sharded(self.model, None)
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, or `DPAdam` with `dp_adam`; see `ShardedTrainer`."""
        reshard(self.model)  # a layer whose shards are gathered holds other tensors
        if getattr(self, "optimizer", None) is None and getattr(self.args, "dp_adam", False):
            decayed = set(self.get_decay_parameter_names(self.model))
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            self.optimizer = DPAdam(
                [
                    {"params": [p for name, p in trained if name in decayed], "weight_decay": self.args.weight_decay},
                    {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
                ],
                lambda: self._begun.gradient_noise_std(),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
            )
        made: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        return made

    def get_train_dataloader(self) -> DataLoader[TrainerDraw]:
        """A loader of Poisson draws, cut into micro-batches of at most `per_device_train_batch_size` rows.

        Raises:
            InvalidArgument: called before `train()`.
        """
        run = self._run
        if run is None:
            refuse("get_train_dataloader", "before train()", "draws belong to a run; iterate over train_dataset")
        sampler = DrawSampler(
            run.sampler(),
            steps_per_epoch=self.plan.steps_per_epoch,
            steps_left=lambda: run.last - run.completed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        workers = self.args.dataloader_num_workers
        return draw_loader(
            self.train_dataset,
            self._cut(),
            sampler,
            rows_per_unit=self._rows_per_unit,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and can_pin(self.args.device),
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def training_step(self, model: nn.Module, inputs: TrainerDraw, _num_items: object = None) -> Tensor:
        """Run one logical step and write its private gradient to `.grad`; returns the loss, which is not private."""
        run = self._begun
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # schedule-free optimizers have a training mode
        run.begin_step()
        total = torch.zeros((), device=self.args.device)
        for batch, items, units, rows_per_unit in self._in_step(inputs["micro_batches"]):
            with self.accelerator.autocast():
                losses = self._losses(model, self._prepare_inputs(batch))
            _require_rows(losses, units, rows_per_unit)
            if not len(items):
                losses = losses * 0.0  # a pass that only keeps in step
            seen = run.backward(losses, rows_per_unit=rows_per_unit, items=items).losses
            total += seen[: len(items) * rows_per_unit].sum()  # the rest fills up
        run.finish_step()
        return self._mean_loss(total, inputs["drawn"])

    def get_batch_samples(
        self, epoch_iterator: Iterator[TrainerDraw], *_settings: object
    ) -> tuple[list[TrainerDraw], None]:
        """The next draw. It has no number of items: that number is private, and nothing is divided by it."""
        return [draw for draw in [next(epoch_iterator, None)] if draw is not None], None

    def floating_point_ops(self, inputs: TrainerDraw | Mapping[str, Tensor]) -> int:
        """Sum over this process's micro-batches of a draw."""
        if "micro_batches" not in inputs:
            return int(super().floating_point_ops(inputs))
        return sum(super(DPTrainer, self).floating_point_ops(batch.inputs) for batch in inputs["micro_batches"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, and add the epsilon spent so far."""
        if self.epsilon is not None:
            logs["epsilon"] = float(rounded_up_to_figures(self.epsilon))  # transformers prints four figures
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the card that `train` writes, because the Trainer's card lists losses, which are not private.

        A run without privacy gets the Trainer's card.
        """
        if self._run is None or self._run.plan.privacy is None:
            super().create_model_card(*args, **kwargs)

    def _in_step(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """This process's micro-batches, as many as any process has if a pass gathers sharded weights."""
        if not self.has_shards:
            return batches
        missing = self._begun.ranks.most(len(batches), self.args.device) - len(batches)
        return [*batches, *[self._empty_batch] * missing]

    @functools.cached_property
    def _empty_batch(self) -> MicroBatch:
        """A micro-batch that holds no item of a draw."""
        return self._cut().empty(int(self._rows_per_unit.min()), self.train_dataset)

    def _cut(self) -> Cutter:
        """Cuts items into micro-batches."""
        return self._items.cut(
            self.args.per_device_train_batch_size,
            drawn=self.plan.expected_batch_size / self.args.world_size,
            overhead=pass_overhead(accelerator=computes_apart(self.args.device), sharded=self.has_shards),
            most_rows=int(self._rows_per_unit.max()),
        )

    @property
    def _items(self) -> TrainerItems:
        """The training set with its collator."""
        return TrainerItems(
            self.model,
            self.train_dataset,
            self._get_collator_with_removed_columns(self.data_collator, description="training"),
            self._max_length,
            private=not self.privacy_args.disable_dp,
        )

    @property
    def _begun(self) -> PrivateRun:
        if self._run is None:
            raise RuntimeError("training has not begun: call train()")
        return self._run

    def _own_arguments(self, args: transformers.TrainingArguments) -> transformers.TrainingArguments:
        """A copy of the arguments with one draw per step, and without skipped draws when the run resumes."""
        own = copy.copy(args)
        own.gradient_accumulation_steps = 1
        own.ignore_data_skip = True
        if self._batch:
            own.max_steps = steps_of(args, num_examples=self._num_examples, batch=self._batch)
        return own

    def _check_rules(self) -> None:
        """Compare the engine's gradients with autograd's on random items, before anything is released."""
        losses = functools.partial(self._losses, self.model)
        self._items.check_rules(losses, self._prepare_inputs, most_rows=self._most_rows)

    def _checkpoint(self, asked: str | bool | None) -> str | None:
        if asked is None or asked is False:
            return None
        found = get_last_checkpoint(self.args.output_dir) if asked is True else str(asked)
        if found is None or Path(found).resolve().parent != Path(self.args.output_dir).resolve():
            refuse("resume_from_checkpoint", asked, f"not a checkpoint of this run; give one in {self.args.output_dir}")
        return found

    def _mean_loss(self, total: Tensor, drawn: int) -> Tensor:
        """This process's loss for the log: the mean over processes is the mean over the draw.

        An empty draw repeats the last value.
        """
        if drawn:
            self._last_loss = total.item() * self.args.world_size / (drawn * self._losses_per_item)
        return torch.tensor(self._last_loss, device=self.args.device)


def _require_rows(losses: Tensor, items: int, rows_per_unit: int) -> None:
    """Refuse rows that were not announced. Each would be clipped to C alone, so two of one item could add 2C."""
    if losses.ndim == 1 and len(losses) != items * rows_per_unit:
        remedy = f"for {items} items with {rows_per_unit} rows each: say how many rows the collator makes per item"
        refuse("rows_per_unit", f"{len(losses)} losses", remedy)


class _RunCallback(transformers.TrainerCallback):
    """Starts the recording when the Trainer is ready, and averages."""

    def __init__(self, trainer: DPTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, _args: object, state: transformers.TrainerState, _control: object, **_: object) -> None:
        run = self._trainer._begun
        self._trainer._check_rules()
        copy_from_main(self._trainer.model)
        run.prepare(self._trainer.model)
        run.__enter__()
        state.max_steps = run.last  # where the Trainer logs, evaluates and saves for the last time

    def on_step_end(self, _args: object, state: transformers.TrainerState, _control: object, **_: object) -> None:
        if self._trainer._average is not None:
            self._trainer._average.add(state.global_step)
