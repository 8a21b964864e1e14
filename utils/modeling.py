"""Loading what the scripts run on: the process group, the tokenizer, the frozen base model.

Failures of the hub or of a folder become one line that names the flag to change.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dptune._validate import refuse
from dptune.adapter_files import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, attach_adapter
from dptune.lora import merge_lora

_REMEDY = "give a folder with a causal language model and its tokenizer, or a hub name (gated: with --access_token)"


def make_accelerator(**kwargs: Any) -> Accelerator:
    """The process group and device of this launch; `kwargs` go to `accelerate.Accelerator`.

    Without a GPU the CPU is asked for by name: accelerate would otherwise give every process a world of its own.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), **kwargs)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == launched, f"{launched} processes launched, {accelerator.num_processes} joined"
    return accelerator


def compute_dtype(mixed_precision: str, device: torch.device | str) -> torch.dtype:
    """The base model's dtype: the launch's `mixed_precision` on a GPU, float32 on a CPU (bf16 is slower there)."""
    if torch.device(device).type == "cpu":
        return torch.float32
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in dtypes:
        refuse("mixed_precision", mixed_precision, f"set it to one of {', '.join(dtypes)} in the launch configuration")
    return dtypes[mixed_precision]


def training_dtype(mixed_precision: str, device: torch.device | str) -> torch.dtype:
    """`compute_dtype`, without fp16: an example's gradient underflows there unless its loss is scaled."""
    dtype = compute_dtype(mixed_precision, device)
    if dtype == torch.float16:
        refuse("mixed_precision", mixed_precision, "not for training; set bf16 or 'no' in the launch configuration")
    return dtype


def load_tokenizer(name: str, *, token: str | None = None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Where it has no padding token its end token pads, so that the vocabulary keeps its size. Raises `InvalidArgument`
    if it cannot be loaded or has no end token (nothing could then mark where a text ends).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, token=token, revision=revision)
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        _refuse_to_load("tokenizer", name, token, error)
    if tokenizer.eos_token_id is None:
        refuse("--model_name_or_path", name, "its tokenizer has no end token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PreTrainedModel:
    """The causal language model of a folder or hub name, every parameter frozen, in evaluation mode.

    Raises `InvalidArgument` if it cannot be loaded, or if the checkpoint lacks weights (they would be random).
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, token=token, revision=revision, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        _refuse_to_load("model", name, token, error)
    missing = sorted(info["missing_keys"])
    if missing:
        refuse(
            "--model_name_or_path", name, f"its checkpoint lacks {len(missing)} weights such as {missing[0]}; {_REMEDY}"
        )
    return model.requires_grad_(False).eval().to(device)


def load_skeleton(name: str, *, token: str | None = None, revision: str | None = None) -> PreTrainedModel:
    """The model's layers without their weights (on the meta device): names, shapes and configuration, in an instant."""
    try:
        config = AutoConfig.from_pretrained(name, token=token, revision=revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        _refuse_to_load("model", name, token, error)


def require_context(model: PreTrainedModel, block_size: int) -> None:
    """`block_size` tokens must fit the context that the model was made for."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and block_size > context:
        refuse("--block_size", block_size, f"the model's context is {context} tokens; give at most that")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; the non-reentrant kind, which hooks and frozen inputs need."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def adapter_files(path: str) -> list[Path]:
    """The files that decide what `load_adapter(path)` attaches. Raises `InvalidArgument` if there is no adapter."""
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    peft = [folder / PEFT_WEIGHTS_NAME, folder / PEFT_CONFIG_NAME]
    if given.is_dir():
        files = peft if peft[1].exists() else [folder / WEIGHTS_NAME]
    else:
        files = [given, peft[1]] if given.suffix == ".safetensors" else [given]
    if not all(file.is_file() for file in files):
        refuse("--lora_weights_path", path, f"no adapter there; give a {WEIGHTS_NAME} file or a PEFT folder")
    return files


def load_adapter(model: PreTrainedModel, path: str, *, merge: bool) -> None:
    """Attach the adapter `path` to `model`, in its weights if `merge`. Raises `InvalidArgument` if it doesn't fit."""
    attach_adapter(model, path)
    if merge:
        merge_lora(model)


def _refuse_to_load(what: str, name: str, token: str | None, error: Exception) -> NoReturn:
    """One line out of a library's message of many, with the token taken out should it be quoted there."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = f"{type(error).__name__}: {reason[:200]}"
    if token:
        reason = reason.replace(token, "***")
    refuse("--model_name_or_path", name, f"no {what} could be loaded ({reason}); {_REMEDY}")
