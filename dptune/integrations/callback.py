"""The callback that makes a plain transformers Trainer private.

    engine = PrivacyEngine(model, args, train_dataset, privacy_args)
    trainer = Trainer(model, args, train_dataset=engine.dataset, data_collator=collator,
                      compute_loss_func=engine.loss, callbacks=[PrivacyEngineCallback(engine)])

The callback clips after each backward pass of the Trainer and writes the private gradient before the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVarTuple

from transformers import TrainerCallback, TrainerState, TrainingArguments

from dptune._validate import InvalidArgument
from dptune.accounting.rounding import rounded_up_to_figures
from dptune.integrations.engine import PrivacyEngine

_Ts = TypeVarTuple("_Ts")


class PrivacyEngineCallback(TrainerCallback):
    """Makes a Trainer private, or refuses to train.

    Args:
        privacy_engine: made with the Trainer's model, arguments and training set.

    Raises:
        InvalidArgument: when training begins, if the Trainer's settings break the guarantee.
    """

    def __init__(self, privacy_engine: PrivacyEngine) -> None:
        self.engine = privacy_engine

    def on_init_end(self, *_event: object, optimizer: Any = None, **_: object) -> None:
        self.engine.note_optimizer(optimizer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, _control: object, **kwargs: Any) -> None:
        self._or_close(self.engine.begin, args, state, kwargs["model"], kwargs["train_dataloader"])

    def on_epoch_begin(self, *_event: object, **_: object) -> None:
        self.engine.dataset.restart()

    def on_step_begin(self, *_event: object, **_: object) -> None:
        self.engine.begin_step()

    def on_substep_end(self, *_event: object, **_: object) -> None:
        self._or_close(self.engine.collect)

    def on_pre_optimizer_step(self, *_event: object, **_: object) -> None:
        self._or_close(self.engine.collect)
        self._or_close(self.engine.finish)

    def on_log(
        self, _args: object, state: TrainerState, _control: object, logs: dict[str, float] | None = None, **_: object
    ) -> None:
        if self.engine.epsilon is not None and logs is not None:  # transformers prints four figures
            logs["epsilon"] = state.log_history[-1]["epsilon"] = float(rounded_up_to_figures(self.engine.epsilon))

    def on_save(self, args: TrainingArguments, state: TrainerState, _control: object, **_: object) -> None:
        self.engine.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, *_event: object, processing_class: Any = None, **_: object) -> None:
        self.engine.end(processing_class)

    def _or_close(self, work: Callable[[*_Ts], None], *args: *_Ts) -> None:
        """Run `work`. An error ends the Trainer's loop, so remove the hooks from the model first."""
        try:
            work(*args)
        except (InvalidArgument, RuntimeError):
            self.engine.close()
            raise
