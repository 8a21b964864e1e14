"""Fine-tuning a classifier, as the training loop sees it: rows, losses, scores, and what a resumed run must share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dptune.report.card import Artifact, published_name
from dptune.report.fields import CardFields
from dptune.report.prior import PriorRelease
from dptune.report.recipe import command_line
from dptune.run.identity import mechanism_identity, model_identity, num_trained
from utils.classification.arguments import ON_RESUME
from utils.classification.dataset import ClassificationDataset
from utils.classification.files import classifier_artifact, save_classifier
from utils.classification.losses import predict
from utils.classification.metrics import metric_scores
from utils.classification.model import Trained
from utils.classification.modes import head_parameters
from utils.classification.outputs import describe_scores, last_scores, write_summary
from utils.classification.plan import PlannedTask
from utils.models.trainable import Losses
from utils.training.changes import OnResume
from utils.training.micro_batches import MicroBatches
from utils.training.optimizers import UpdateSettings
from utils.training.task import PER_EXAMPLE, Finished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings that the model card states, even at their defaults.
_ALWAYS_TOLD = ("finetune_mode", "block_size", "batch_size", "num_train_epochs", "optimizer", "lr_scheduler_type")


@dataclass
class ClassifierTask:
    """Fine-tuning a classifier; see `utils.training.task.Task`."""

    planned: PlannedTask
    fine_tuned: Trained
    tokenizer: PreTrainedTokenizerBase
    losses: Losses
    logits: Callable[[Mapping[str, Tensor]], Tensor]
    loss_unit: str = PER_EXAMPLE
    starts_from: tuple[PriorRelease, ...] = ()

    @property
    def model(self) -> Any:
        """The classifier in its mode."""
        return self.fine_tuned.model

    @property
    def rows(self) -> ClassificationDataset:
        """The training split."""
        return self.planned.task.train

    @property
    def trained(self) -> list[str]:
        """Names of the trained parameters."""
        return self.fine_tuned.names

    @property
    def head(self) -> list[str]:
        """Names of the trained parameters of the classification head."""
        return head_parameters(self.model, self.fine_tuned.names)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return identity_of(self.planned, self.fine_tuned)

    @property
    def base_model(self) -> str:
        """Name of the checkpoint that is fine-tuned, or its folder if its name on the hub is not known."""
        settings = self.planned.settings
        return settings.card.base_model_name or settings.checkpoint.model_name_or_path

    @property
    def artifact(self) -> Artifact:
        """A whole model, an adapter, or both."""
        return classifier_artifact(self.model, suffix=self.planned.settings.head.prompt_suffix)

    @property
    def card(self) -> CardFields:
        """What the model card says besides the guarantee."""
        return self.planned.settings.card.fields(classifier_recipe(self.planned, self.fine_tuned.updates))

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the classifier must know of the training."""
        head = self.planned.settings.head
        return {
            "max_length": self.planned.settings.checkpoint.block_size,
            "class_names": list(self.planned.task.class_names),
            "num_texts": self.planned.task.num_texts,
            **{name: value for name, value in vars(head).items() if value is not None},
        }

    def evaluate(self, micro_batches: MicroBatches) -> dict[str, Any]:
        """Loss and scores on the validation splits, if there are any."""
        found, total, rows = {}, 0.0, 0
        task = self.planned.task
        for split, data in task.validation.items():
            classes, loss = predict(self.logits, data, micro_batches)
            found[split] = metric_scores(data.labels, classes, task.metrics)
            total, rows = total + loss * len(data), rows + len(data)
        return {"eval_loss": total / rows, "scores": found} if rows else {}

    def save(self, folder: Path) -> None:
        """Write the trained model or adapter, with the tokenizer."""
        save_classifier(self.model, self.tokenizer, folder, base_model=self.base_model)

    def conclude(self, finished: Finished) -> list[str]:
        """Write `results.json`, which is not private."""
        task = self.planned.task
        write_summary(finished, task, self.planned.settings, num_trained(self.model))
        return describe_scores(task, last_scores(finished))

    def help_save(self) -> None:
        """Nothing: every rank holds the whole classifier."""


def identity_of(planned: PlannedTask, trained: Trained) -> dict[str, Any]:
    """What a resumed run must share, as JSON values. Process counts and micro-batch sizes may differ."""
    task, settings, plan = planned
    selection = settings.results.of_task(settings.folder).selection
    return (
        known_beginning(planned)
        | {"training_data": task.train.fingerprint()}
        | {
            **asdict(trained.updates),
            **settings.steps.averaging.identity,
            "max_grad_norm": settings.budget.plain_max_grad_norm,
            "steps": plan.steps,
            "seed": settings.steps.seed,
            "max_length": settings.checkpoint.block_size,
            "checkpoint": trained.checkpoint,
            **model_identity(trained.model),
        }
        | ({"selection": asdict(selection)} if selection.decides else {})
    )


def known_beginning(planned: PlannedTask) -> dict[str, Any]:
    """The part of `identity_of` that is known before the model is loaded.

    Mode and head come first: a measured clip norm follows them, and would be named in their place.
    """
    settings = planned.settings
    head = vars(settings.head) if settings.head.is_given else {}
    return vars(settings.mode) | head | mechanism_identity(planned.plan)


def classifier_recipe(planned: PlannedTask, updates: UpdateSettings) -> str:
    """The command line of this run for its model card, without private names."""
    settings = planned.settings
    task = f" --datasets {planned.task.name}" if settings.data.datasets else ""
    name = settings.card.base_model_name or settings.checkpoint.model_name_or_path
    return command_line(
        f"python train_classifier.py --output_dir OUT{task}",
        *settings,
        always=_ALWAYS_TOLD,
        never=[name for name, kind in ON_RESUME.items() if kind is OnResume.RUNTIME],
        shown=("label_words", "lora_target_modules", "noise_bands"),
        names={
            "model_name_or_path": published_name(name),
            "learning_rate": f"{updates.learning_rate:g}",
            "head_learning_rate": f"{updates.head_learning_rate:g}",
        },
    )
