"""A task for the training loop: a tiny adapted Llama and ten rows, evaluated by a number that is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dptune import CausalLMLoss
from dptune.report.card import LORA_ADAPTER, Artifact
from dptune.report.fields import NO_FIELDS, CardFields
from dptune.report.prior import PriorRelease
from dptune.run.plan import RunPlan, make_plan
from dptune.run.settings import PrivacySettings
from dptune.shapes import Shapes
from tests.dptune.integrations.runs import lora_llama
from tests.examples import random_examples
from utils.cli.launch import make_accelerator
from utils.data.tokenization import TokenizedDataset
from utils.models.trainable import Losses
from utils.training.loop import Pace
from utils.training.micro_batches import MicroBatches
from utils.training.optimizers import UpdateSettings
from utils.training.task import PER_TOKEN, Finished

COUNT, BATCH, STEPS, SEED = 10, 5, 5, 3


def rows(count: int = COUNT) -> TokenizedDataset:
    """Random rows of different lengths."""
    examples = random_examples(count)
    starts = np.cumsum([0, *(len(ids) for ids, _ in examples)])
    ids, labels = (np.concatenate([example[part] for example in examples]) for part in (0, 1))
    return TokenizedDataset(ids.astype(np.int32), labels != -100, starts, num_cut=0)


@dataclass
class TinyTask:
    """See `utils.training.task.Task`. Its hooks let a test look at a run while it trains, and at what it saves."""

    model: nn.Module = field(default_factory=lora_llama)
    rows: TokenizedDataset = field(default_factory=rows)
    on_evaluate: Callable[[], object] = lambda: None
    on_save: Callable[[Path], object] = lambda _: None
    loss_unit: str = PER_TOKEN
    trained: None = None
    head: tuple[str, ...] = ()
    starts_from: tuple[PriorRelease, ...] = ()
    base_model: str = "a-model"
    artifact: Artifact = LORA_ADAPTER
    card: CardFields = NO_FIELDS
    settings: dict[str, Any] = field(default_factory=lambda: {"prompt_style_of_rows": "plain"})
    identity: dict[str, Any] = field(default_factory=lambda: {"training_data": "those"})

    @property
    def losses(self) -> Losses:
        """One loss per row."""
        return CausalLMLoss(self.model)

    def evaluate(self, _micro_batches: MicroBatches) -> dict[str, Any]:
        """A loss that was not measured."""
        self.on_evaluate()
        return {"eval_loss": 4.0}

    def save(self, folder: Path) -> None:
        """Write something instead of weights."""
        (folder / "lora_weights.bin").touch()
        self.on_save(folder)

    def conclude(self, finished: Finished) -> list[str]:
        """Nothing is written here."""
        return [f"ended in               {finished.folder}"]


def plan(*, private: bool = True, steps: int = STEPS, test_seed: int | None = SEED) -> RunPlan:
    """A run of a few steps that draws half of the rows."""
    settings = PrivacySettings(clip_norm=0.5, noise_multiplier=1.0, delta=1e-3) if private else None
    return make_plan(settings, num_examples=COUNT, batch=BATCH, steps=steps, test_seed=test_seed)


def pace(**changed: Any) -> Pace:
    """Adam, with an evaluation every two steps."""
    return Pace(UpdateSettings("adamw", 0.01, 0.0, lr_scheduler_type="cosine"), **({"eval_freq": 2} | changed))


def micro_batches(task: TinyTask) -> MicroBatches:
    """Of few rows each."""
    return MicroBatches(task.rows, Shapes(64, 60, drawn=1e6), 0, make_accelerator())
