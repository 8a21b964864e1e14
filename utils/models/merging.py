"""Write a base model with an adapter merged into its weights, for every program that loads a folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dptune._files import write_folder
from dptune._validate import refuse
from dptune.adapter_files import PEFT_CONFIG_NAME, attach_adapter
from dptune.lora import fold_lora
from dptune.published import published_model, published_part
from dptune.report.merged import carry_guarantee
from dptune.report.statement import PrivacyStatement
from utils.models.loading import adapter_files, load_model, load_skeleton, load_tokenizer

_BASE_FLAG = "--model_name_or_path"


class Merge(NamedTuple):
    """An adapter, its base model, and the data type of what is written."""

    adapter: str
    base: str
    revision: str | None
    dtype: torch.dtype


def plan_merge(adapter: str, *, base: str | None, revision: str | None, dtype: str | None) -> Merge:
    """Find the base model and check that the adapter fits it, before its weights are read.

    Args:
        adapter: a run's folder, its folder `publish`, an adapter's file or a PEFT folder.
        base: folder or hub name; None for the one that the adapter's configuration names.
        revision: of a base model on the hub.
        dtype: name of a torch dtype; None for that of the base model.

    Raises:
        InvalidArgument: there is no adapter or no base model, they do not fit, or the base is stored quantised.
    """
    folder = _folder_of(adapter)
    name = published_model(base or _named_base(adapter, folder))
    skeleton: Any = load_skeleton(name, revision=revision)
    stored = getattr(skeleton.config, "quantization_config", None)
    if stored is not None:
        told = f"its weights are stored quantised ({_method_of(stored)}), and merging would round them again"
        refuse(_BASE_FLAG, name, f"{told}; give the model that it was made from, unquantised")
    attach_adapter(skeleton, adapter)
    own = skeleton.config.dtype or torch.float32
    return Merge(adapter, name, revision, own if dtype is None else getattr(torch, dtype))


def write_merged(plan: Merge, target: Path) -> PrivacyStatement | None:
    """Make the folder `target` with model, tokenizer, and the adapter's report, card and ledger; whole or not at all.

    It takes memory for the model and one more layer.

    Args:
        plan: see `plan_merge`.
        target: a folder that does not exist, or is empty.

    Returns:
        The adapter's guarantee, which is the merged model's; None if the adapter has no report.

    Raises:
        InvalidArgument: something cannot be loaded.
    """
    folder = _folder_of(plan.adapter)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder)) if own else load_tokenizer(plan.base, revision=plan.revision)
    model = load_model(plan.base, revision=plan.revision, dtype=plan.dtype, device="cpu")
    attach_adapter(model, plan.adapter)
    fold_lora(model)
    _untie(model)
    found: list[PrivacyStatement | None] = []

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        found.append(carry_guarantee(folder, partial))

    write_folder(target, write)
    return found[0]


def _untie(model: Any) -> None:
    """Let the configuration say that the head has weights of its own, if its adapter gave it some."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _folder_of(adapter: str) -> Path:
    """The folder that the adapter lies in."""
    folder = published_part(adapter)
    if (folder / "config.json").is_file() and not (folder / PEFT_CONFIG_NAME).is_file():
        refuse("path", adapter, "holds a whole model, which loads as it is; give an adapter")
    return adapter_files(adapter)[0].parent


def _named_base(adapter: str, folder: Path) -> str:
    """The base model in the adapter's configuration."""
    try:
        named = json.loads((folder / PEFT_CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        named = None
    if not isinstance(named, str) or not named:
        refuse(_BASE_FLAG, None, f"{adapter} does not name its base model; give its folder or hub name")
    return named


def _method_of(stored: Any) -> str:
    """The name of a quantisation method in a model's configuration."""
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method))
