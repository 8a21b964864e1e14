"""transformers' Trainer for a model that is sharded already, with `dptune.sharding.shard`.

The Trainer would move such a model to a device, wrap it, save only one rank's part of it, and read whole weights into
shards. Here the model stays as it is. Each rank writes its own shards into a checkpoint, in the form of
`dptune.run.checkpoint`. The finished model is written one tensor at a time, as files that `from_pretrained` reads.

Without sharded weights all this is the Trainer's own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dptune._validate import Described, present, refuse
from dptune.integrations.sharded_saving import write_sharded
from dptune.integrations.state import read_privacy_state, save_average, save_privacy_state
from dptune.iterate_average import IterateAverage
from dptune.optimizers import DPAdam, LowPassAdam
from dptune.ranks import Ranks
from dptune.run.checkpoint import TrainingState, load_checkpoint
from dptune.run.session import PrivateRun, SavedRun
from dptune.run.shards import SHARDS_NAME
from dptune.run.training_state import put_back, write_checkpoint
from dptune.sharding import holds_shards

# Their states have the weights' shapes.
_BY_VALUE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, DPAdam, LowPassAdam)


class ShardedTrainer(transformers.Trainer):
    """A Trainer that leaves sharded weights as they are, saves them and resumes with them.

    Attributes:
        has_shards: whether weights of the model are sharded.
    """

    _run: PrivateRun | None = None
    _resumed: TrainingState | None = None  # the checkpoint with shards that this training resumes
    _average: IterateAverage | None = None  # of the weights, while training

    @property
    def has_shards(self) -> bool:
        return holds_shards(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """Keep the model unwrapped, because processes must add up their gradients after clipping and noise."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def unwrapped(model: nn.Module, device_placement: bool | None = None, **_: Any) -> nn.Module:
            placed = False if holds_shards(model) else device_placement
            prepared: nn.Module = prepare(model, device_placement=placed, evaluation_mode=True)
            return prepared

        self.accelerator.prepare_model = unwrapped

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model for `from_pretrained`, one tensor at a time if it is sharded. Every process must call it."""
        if not self.has_shards:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        write_sharded(self.model, folder if self.is_world_process_zero() else None)
        if self.is_world_process_zero():
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        self.accelerator.wait_for_everyone()

    @property
    def _tokenizer(self) -> Any:
        """What is saved beside the model; None if the Trainer was given none."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def saved_run(self, checkpoint: str | None, ranks: Ranks) -> SavedRun | None:
        """What the run must know of the checkpoint that it resumes. Every process must call this.

        Raises:
            InvalidArgument: the checkpoint is damaged or not of a private run, or lacks the shards of a sharded model.
        """
        self._resumed = None
        if checkpoint is None:
            return None
        folder = Path(checkpoint)
        self._resumed = ranks.from_main(lambda: load_checkpoint(folder) if (folder / SHARDS_NAME).exists() else None)
        if self._resumed is not None:
            return SavedRun.of(self._resumed, folder)
        if self.has_shards:
            remedy = "holds whole weights, not shards; resume it without sharding the model"
            refuse("--resume_from_checkpoint", checkpoint, remedy)
        return ranks.from_main(lambda: read_privacy_state(folder))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer.

        Raises:
            InvalidArgument: with sharded weights, its states do not have the weights' shapes, or it was made with other
                tensors than the model's shards.
        """
        made: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.has_shards:
            _require_fit(getattr(made, "optimizer", made), self.model)
        return made

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not holds_shards(model):
            super()._move_model_to_device(model, device)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.has_shards:
            self._save_privacy()
            super()._save_checkpoint(model, trial)
            return
        self.store_flos()
        write_checkpoint(
            present(self._run, "run"),
            self.model,
            self.optimizer,
            self.lr_scheduler,
            keep=self.args.save_total_limit,
            more=lambda: {TRAINER_STATE_NAME: self._state_as_json()},
            average=self._average,
        )

    def _save_privacy(self) -> None:
        """Write what a resumed run needs besides the Trainer's own files, before those: the Trainer ends its checkpoint
        by deleting older ones (`save_total_limit`), and then this one must be complete."""
        if self._run is None or not self.is_world_process_zero():
            return
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_privacy_state(self._run, checkpoint)
        if self._average is not None:
            save_average(self._average, checkpoint)

    def _state_as_json(self) -> bytes:
        """The Trainer's state, as the Trainer writes it, with the states of its callbacks."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, states = type(callback).__name__, self.state.stateful_callbacks
                if isinstance(states[name], list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()
        return (json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n").encode()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._resumed is None:  # else it is read with the optimizer
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        put_back(self._resumed, self.model, self.optimizer, self._average)
        self.lr_scheduler.load_state_dict(self._resumed.schedule)


def _require_fit(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    kind = Described(type(optimizer).__name__)
    if type(optimizer) not in _BY_VALUE:
        names = ", ".join(sorted({one.__name__ for one in _BY_VALUE}))
        refuse("--optim", kind, f"cannot train sharded weights; use one of {names}")
    shards = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in shards for group in optimizer.param_groups for parameter in group["params"]):
        refuse("optimizers", kind, "was made after a forward pass, of gathered weights; make it before")
