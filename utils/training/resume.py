"""What a training run saves to go on after a crash, and what a resumed run must share with it.

Sampling and noise are not saved: a resumed run takes fresh secret randomness, so a step that ran beyond the checkpoint
is another release when it runs again, and the ledger counts both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor

from dptune._validate import refuse
from dptune.accounting import max_steps
from dptune.adapter_files import adapter_state_dict
from dptune.clipping import FLAT
from dptune.ledger import Ledger, has_begun
from dptune.lora import adapters
from dptune.run.checkpoint import LEDGER_NAME, TrainingState, find_checkpoint, load_checkpoint, save_checkpoint
from dptune.step import PlainStep, PrivateStep
from dptune.units.batches import Rows
from utils.models.trainable import parameters_by_name
from utils.training.arguments import OptimizationArguments, OutputArguments, PrivacyArguments
from utils.training.outputs import refuse_existing_run
from utils.training.plan import RunPlan

AnyStep = PrivateStep | PlainStep

_SAMPLED_VALUES = 16  # at most, of each weight: enough to tell models apart, and read in an instant


def find_saved_run(output: OutputArguments, accelerator: Accelerator) -> TrainingState | None:
    """What --resume_from_checkpoint names, on every rank; None for a run that begins.

    Raises `InvalidArgument` where a run would begin in a folder that holds one already.
    """
    found = [_find_saved_run(output) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def _find_saved_run(output: OutputArguments) -> TrainingState | None:
    if output.resume_from_checkpoint is None:
        refuse_existing_run(output.output_dir)
        return None
    folder = find_checkpoint(output.output_dir, output.resume_from_checkpoint)
    if folder is None:
        if has_begun(Path(output.output_dir) / LEDGER_NAME):
            remedy = "a run began there and saved no checkpoint; give a new --output_dir"
            refuse("--resume_from_checkpoint", output.resume_from_checkpoint, remedy)
        return None
    state = load_checkpoint(folder)
    if state.ledger_steps:
        ledger = Ledger(Path(output.output_dir) / LEDGER_NAME)
        ledger.require_continues(folder / LEDGER_NAME, state.ledger_steps)
    return state


def processes_of_plan(saved: TrainingState | None, optimization: OptimizationArguments, num_processes: int) -> int:
    """The number of processes that the logical batch is computed with.

    A run that is resumed on more or fewer processes keeps its logical batch: with unchanged flags that is the number it
    began with, with flags that were changed to make up for it the present one.
    """
    if saved is None:
        return num_processes
    per_process = optimization.per_device_train_batch_size * optimization.gradient_accumulation_steps
    began_with = int(saved.config["num_processes"])
    return num_processes if per_process * num_processes == saved.identity["run"]["expected_batch_size"] else began_with


def run_identity(plan: RunPlan, data: Rows, privacy: PrivacyArguments, optimizer: str = "adamw") -> dict[str, Any]:
    """What decides the mechanism, the data and the updates, as JSON values. Not private: the data's fingerprint is in
    it. What is as by default is left out: checkpoints from before there was a choice can go on."""
    mechanism, unit = plan.privacy, plan.unit
    chosen: dict[str, Any] = {} if optimizer == "adamw" else {"optimizer": optimizer}
    if mechanism is not None and mechanism.clipping != FLAT:
        chosen["clipping"] = repr(mechanism.clipping)
    if unit.column is not None:
        chosen |= {
            "privacy_unit": unit.column,
            "user_level_method": unit.method,
            "examples_per_unit": unit.examples,
        }
        chosen |= {"unit_gradient": unit.gradient} if unit.samples_authors else {}
    return chosen | {
        "clip_norm": mechanism.clip_norm if mechanism else None,
        "noise_multiplier": mechanism.noise_multiplier if mechanism else None,
        "delta": mechanism.delta if mechanism else None,
        "expected_batch_size": plan.expected_batch_size,
        "sampling_probability": plan.sampling_probability,
        "target_epsilon": privacy.target_epsilon,
        "insecure_test_seed": privacy.insecure_test_seed,
        "num_examples": plan.num_examples,
        "training_data": data.fingerprint(),
    }


def model_identity(model: nn.Module) -> dict[str, Any]:
    """The base model and the shapes of what is trained, as JSON values; meaningful on the main process only."""
    shapes = {
        name: [adapter.rank, *adapter.B.weight.shape[:1], *adapter.A.weight.shape[1:], adapter.alpha]
        for name, adapter in adapters(model)
    }
    frozen = ((name, weight) for name, weight in model.named_parameters() if not weight.requires_grad)
    identity: dict[str, Any] = {"base_model": fingerprint(frozen), "adapters": shapes}
    trained = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora." not in name
    }
    return identity | ({"trained": trained} if trained or not shapes else {})


def fingerprint(weights: Iterable[tuple[str, nn.Parameter]]) -> str:
    """SHA-256 over names, shapes and values from the first row of each of these weights, which rank 0 holds, however
    many ranks share the rest."""
    digest = hashlib.sha256()
    for name, parameter in weights:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        first = local.detach()[:1].flatten()[:_SAMPLED_VALUES].cpu()
        if first.is_floating_point():
            first = first.bfloat16()  # one model loaded in two precisions is one model
        digest.update(
            f"{name}{tuple(parameter.shape)}".encode() + first.contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def last_step(plan: RunPlan, ledger: Ledger | None, target_epsilon: float | None, completed: int) -> int:
    """The step after which the run ends: the planned one, or an earlier one if repeated steps used up the budget."""
    if ledger is None or plan.privacy is None or target_epsilon is None or ledger.steps <= completed:
        return plan.steps
    affordable = max_steps(
        target_epsilon=target_epsilon,
        delta=plan.privacy.delta,
        noise_multiplier=plan.privacy.noise_multiplier,
        sampling_probability=plan.privacy.sampling_probability,
        at_least=plan.steps,
        group_size=plan.privacy.group_size,
    )
    return min(plan.steps, max(completed, completed + affordable - ledger.steps))


@dataclass(frozen=True)
class Checkpoints:
    """Saves and restores one run; the main process writes.

    Attributes:
        folder: the run's.
        ledger: of a private run, on the main process.
        identity, config: what a resumed run is held against, and the resolved settings.
        every: steps between checkpoints; 0 for none.
        keep: how many are kept; None keeps all.
        accelerator: the ranks.
        trained: names of the model's own parameters, if they are trained; None for adapters.
    """

    folder: Path
    ledger: Ledger | None
    identity: dict[str, Any]
    config: dict[str, Any]
    every: int
    keep: int | None
    accelerator: Accelerator
    trained: Sequence[str] | None = None

    def save(self, completed: int, model: nn.Module, optimizer: Any, schedule: Any, step: AnyStep) -> None:
        """Write what a run that has completed so many steps needs to go on; every rank calls it."""
        if self.accelerator.is_main_process:
            state = TrainingState(
                step=completed,
                ledger_steps=self.ledger.steps if self.ledger else 0,
                identity=self.identity,
                config=self.config,
                weights=adapter_state_dict(model) if self.trained is None else parameters_by_name(model, self.trained),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                mechanism=step.state_dict(),
            )
            save_checkpoint(self.folder, state, self.ledger, keep=self.keep)

    def due(self, completed: int, last: int) -> bool:
        """Whether a checkpoint belongs after so many steps: every few, and after the last."""
        return self.every > 0 and (completed % self.every == 0 or completed == last)


def restore(saved: TrainingState | None, model: nn.Module, optimizer: Any, schedule: Any, step: AnyStep) -> int:
    """Put back what was saved, the same on every rank; returns the steps that were completed."""
    if saved is None:
        return 0
    weights = {name: value for name, value in saved.weights.items() if not name.endswith(".alpha")}
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, f"what was saved is of another model: {unexpected[0]}"
    optimizer.load_state_dict(saved.optimizer)
    schedule.load_state_dict(saved.schedule)
    if saved.mechanism:
        step.load_state_dict(saved.mechanism)
    return saved.step
