"""A language model that train_clm.py fine-tunes: what is saved, published and told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dptune.adapter_files import save_adapter
from dptune.audit.training import AUDIT_FOLDER
from dptune.integrations.sharded_saving import write_sharded
from dptune.published import CANARIES_SETTING
from dptune.report.card import LORA_ADAPTER, WHOLE_MODEL, Artifact, published_name
from dptune.report.fields import CardFields
from dptune.report.prior import PriorRelease
from dptune.report.recipe import command_line
from dptune.sharding import is_sharded
from utils.data.prompts import PROMPT_STYLE_OF_ROWS
from utils.data.template_date import TEMPLATE_DATE
from utils.data.tokenization import TokenizedDataset
from utils.models.trainable import Losses, save_trained_model
from utils.training.arguments import ON_RESUME, Groups
from utils.training.canaries import finish_canaries
from utils.training.causal_lm.job import CausalLMJob
from utils.training.changes import OnResume
from utils.training.dials import detach_dials
from utils.training.evaluation import held_out_loss
from utils.training.micro_batches import MicroBatches
from utils.training.task import PER_TOKEN, Finished

# Settings that the model card states, even at their defaults.
_ALWAYS_TOLD = (
    "block_size",
    "clip_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "learning_rate",
    "lr_scheduler_type",
)


@dataclass
class CausalLMTask:
    """Fine-tuning a causal language model; see `utils.training.task.Task`."""

    job: CausalLMJob
    model: Any
    losses: Losses
    trained: Sequence[str] | None
    identity: dict[str, Any]
    loss_unit: str = PER_TOKEN
    head: Sequence[str] = ()
    dials: torch.nn.Embedding | None = None

    @property
    def rows(self) -> TokenizedDataset:
        """The training set."""
        return self.job.train

    @property
    def base_model(self) -> str:
        """Name of the model that is fine-tuned, or its folder if its name on the hub is not known."""
        groups = self.job.groups
        return groups.card.base_model_name or groups.model.model_name_or_path

    @property
    def starts_from(self) -> tuple[PriorRelease, ...]:
        """The release that the adapters start from, and those before it."""
        return self.job.starts_from

    @property
    def artifact(self) -> Artifact:
        """What the run produces."""
        return LORA_ADAPTER if self.trained is None else WHOLE_MODEL

    @property
    def card(self) -> CardFields:
        """What the model card says besides the guarantee."""
        return self.job.groups.card.fields(recipe_of(self.job.groups, self.job.config["num_processes"]))

    @property
    def settings(self) -> dict[str, Any]:
        """What sampling must know of the training."""
        given = {"block_size": self.job.groups.data.block_size} | self.job.config
        told = {name: given[name] for name in (PROMPT_STYLE_OF_ROWS, TEMPLATE_DATE, "block_size") if name in given}
        count = self.job.groups.privacy.num_canaries
        return told | ({CANARIES_SETTING: count} if count else {})

    def evaluate(self, micro_batches: MicroBatches) -> dict[str, Any]:
        """The held-out loss, if there is held-out data."""
        held_out = self.job.held_out
        return {} if held_out is None else {"eval_loss": held_out_loss(self.losses, held_out, micro_batches)}

    def save(self, folder: Path) -> None:
        """Write the adapter or the whole model, with the tokenizer and without an audit's dials."""
        detach_dials(self.model)
        if self.trained is None:
            save_adapter(self.model, folder, base_model=self.base_model)
        else:
            save_trained_model(self.model, folder)
        self.job.tokenizer.save_pretrained(folder)

    def conclude(self, finished: Finished) -> list[str]:
        """Write the scores of the canaries, if there are any."""
        if self.job.canaries is not None:
            finish_canaries(finished.folder, self.model, self.losses, self.job.folder.accelerator.device)
        told = f"now run python -m dptune.audit training {finished.folder}"
        count = self.job.groups.privacy.num_canaries
        return [f"audit (not private)    {finished.folder / AUDIT_FOLDER}; {told}"] if count else []

    def help_save(self) -> None:
        """Of a whole model with sharded weights, every rank gathers each tensor."""
        if self.trained is not None and is_sharded(self.model):
            write_sharded(self.model, None)


def recipe_of(groups: Groups, num_processes: int) -> str:
    """The command line of this run for its model card, without private names."""
    optimization, lora = groups.optimization, groups.lora
    always = [*_ALWAYS_TOLD, *([] if lora.trainable else ("lora_r", "lora_alpha", "lora_target_modules"))]
    always += [] if optimization.max_train_steps else ["num_train_epochs"]
    return command_line(
        f"accelerate launch --num_processes {num_processes} train_clm.py --output_dir OUT",
        *groups,
        always=always,
        never=[name for name, kind in ON_RESUME.items() if kind is OnResume.RUNTIME],
        shown=("lora_target_modules", "trainable", "layer_clip_norms", "noise_bands"),
        names={"model_name_or_path": published_name(groups.card.base_model_name or groups.model.model_name_or_path)},
    )
