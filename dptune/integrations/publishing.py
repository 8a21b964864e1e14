"""What a private Trainer leaves for publishing: its model in `output_dir/publish`, with report, card and ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from dptune.adapter_files import save_adapter
from dptune.integrations.peft import method_of
from dptune.integrations.privacy_arguments import PrivacyArguments
from dptune.integrations.sharded_saving import write_sharded
from dptune.lora import adapters
from dptune.report.card import LORA_ADAPTER, Artifact
from dptune.report.fields import CardFields
from dptune.report.publish import publish
from dptune.report.recipe import command_line
from dptune.run.session import PrivateRun, describe_end
from dptune.sharding import holds_shards, original_class_name

_PACKAGES = ("transformers", "accelerate")
# Arguments of a Trainer that the model card states.
_TOLD = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "dp_adam",
    "ema",
    "average_last",
)
_TOLD_IF_PRIVATE = ("clip_norm", "delta")
_WHOLE = Artifact(
    "model",
    "fine-tuned copy of",
    "transformers",
    (),
    "Load it from the folder of this card, with the class of transformers that it was trained with.\n",
)
_PEFT = Artifact(
    "adapter",
    "adapter for",
    "peft",
    (),
    'Load `{base}` with transformers, then run `PeftModel.from_pretrained(model, ".")` of PEFT in this folder.\n',
)


def publish_run(
    run: PrivateRun, model: nn.Module, card: CardFields, tokenizer: Any = None, *, average: str | None = None
) -> list[str]:
    """Make the folder that may be published; returns lines of text for the user. Rank 0 only.

    If the model's weights are sharded, the other ranks call `write_sharded(model, None)` meanwhile.

    Args:
        run: the run, which has ended.
        model: the trained model.
        card: what the model card says besides the guarantee.
        tokenizer: saved beside the model, if there is one.
        average: what the model's weights average, in words, if they do.
    """
    statement = run.statement(_PACKAGES, average=average)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or original_class_name(model)
    base = card.base_model or name

    def save(folder: Path) -> None:
        _save(model, folder, base)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    kind = _artifact_of(model)
    folder = publish(run.folder, statement, save, ledger=run.ledger, base_model=base, artifact=kind, card=card)
    return [*describe_end(run, statement), f"to publish             {folder}"]


def with_recipe(
    card: CardFields,
    args: Any,
    privacy: PrivacyArguments,
    *more: Any,
    program: str = "torchrun --nproc_per_node {processes} YOUR_SCRIPT.py",
    names: Mapping[str, str] | None = None,
) -> CardFields:
    """`card` with the settings of a Trainer, as flags of a script, unless it says already how to repeat the run.

    Args:
        card: what the user gave.
        args: the Trainer's arguments.
        privacy, *more: further dataclasses of settings.
        program, names: see `command_line`.
    """
    if card.recipe is not None:
        return card
    told = {*_TOLD, "max_steps" if args.max_steps > 0 else "num_train_epochs"}
    never = {one.name for one in fields(args)} - told
    always = told if privacy.disable_dp else {*told, *_TOLD_IF_PRIVATE}
    words = program.format(processes=args.world_size)
    shown = ("noise_bands",)
    recipe = command_line(words, args, privacy, *more, always=always, never=never, shown=shown, names=names)
    return replace(card, recipe=recipe)


def _artifact_of(model: nn.Module) -> Artifact:
    if method_of(model) is not None:
        return _PEFT
    return LORA_ADAPTER if _has_only_adapters(model) else _WHOLE


def _has_only_adapters(model: nn.Module) -> bool:
    """Whether nothing but adapters of `add_lora` was trained."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return any(adapters(model)) and all(".lora." in name for name in trained)


def _save(model: Any, folder: Path, base: str) -> None:
    """Write an adapter, or a whole model."""
    if holds_shards(model):
        write_sharded(model, folder)
    elif method_of(model) is not None:
        model.active_peft_config.base_model_name_or_path = base
        model.save_pretrained(folder)
    elif _has_only_adapters(model):
        save_adapter(model, folder, base_model=base)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
