"""The model of train_classifier.py: a checkpoint in its mode, with its trained parameters and their rates."""

from __future__ import annotations

from typing import Any, NamedTuple

from accelerate.utils import set_seed

from dptune._validate import present
from dptune.mechanism import PrivacyConfig
from dptune.run.identity import weights_fingerprint
from utils.classification.arguments import Settings
from utils.classification.files import load_classifier
from utils.classification.label_words import start_head
from utils.classification.measured_defaults import rates_of_model
from utils.classification.modes import head_modules, prepare_mode
from utils.classification.tasks import ClassificationTask
from utils.models.loading import require_context
from utils.training.optimizers import UpdateSettings
from utils.training.views import require_different_views


class Trained(NamedTuple):
    """A model in its mode, its trained parameters, how they are updated, and a fingerprint of the starting weights."""

    model: Any
    names: list[str]
    updates: UpdateSettings
    checkpoint: str


def load_in_mode(task: ClassificationTask, settings: Settings, tokenizer: Any, config: PrivacyConfig | None) -> Trained:
    """A fresh model in its mode on the CPU, the same on every rank.

    Args:
        task: names the classes.
        settings: with the optimizer and the label words known.
        tokenizer: the model's.
        config: the mechanism, which default rates depend on; None without privacy, or before it is planned.

    Raises:
        InvalidArgument: no such model, a mode that does not fit it, or a --block_size beyond its context.
    """
    set_seed(settings.steps.seed)  # for the new weights
    name, mode = settings.checkpoint.model_name_or_path, settings.mode
    model, new = load_classifier(name, task.class_names, pad_token_id=tokenizer.pad_token_id)
    if (words := settings.head.label_words) is not None:
        start_head(model, words, tokenizer, suffix=settings.head.prompt_suffix, name=name)
    longest, virtual = settings.checkpoint.block_size, settings.virtual_tokens
    require_context(model, longest, flag="--block_size", virtual_tokens=virtual)
    updates = settings.updates(rates_of_model(model, config, present(settings.steps.optimizer, "optimizer")))
    fresh = tuple(f"{module}." for module in [*head_modules(model), *new])
    checkpoint = weights_fingerprint(named for named in model.named_parameters() if not named[0].startswith(fresh))
    flags = vars(mode) | {"also_trained": new}
    model, names = prepare_mode(model, flags.pop("finetune_mode"), **flags)
    require_different_views(settings.views, model)
    return Trained(model, names, updates, checkpoint)


def describe_rates(updates: UpdateSettings, *, chosen: bool) -> str:
    """The peak learning rates in a printable line; `chosen` says whether the user gave --learning_rate."""
    given = "" if chosen else " (default of this mode)"
    same = updates.head_learning_rate == updates.learning_rate
    head = "" if same else f", {updates.head_learning_rate:g} for the head"
    return f"learning rate          {updates.learning_rate:g}{given}{head}"
