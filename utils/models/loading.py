"""Loads tokenizers, frozen base models and adapters.

A failure to load becomes one line that names the flag to change.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dptune._validate import refuse
from dptune._words import counted
from dptune.adapter_files import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, attach_adapter
from dptune.integrations.vocabulary import context_of
from dptune.lora import merge_lora
from dptune.published import published_part
from utils.cli.launch import Sharding
from utils.models.arguments import FLASH
from utils.models.gguf import REMEDY as GGUF_REMEDY
from utils.models.gguf import GgufSource, read_tokenizer, refuse_gguf, source_of
from utils.models.quantization import keep_differentiable, quantized_loading, round_rows_alone
from utils.models.sharded import load_sharded_model

_CONFIGURATION = {"config.json", "generation_config.json"}
_REMEDY = "give a folder with a causal language model and its tokenizer, or a hub name (gated: with --access_token)"


def load_tokenizer(name: str, *, token: str | None = None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub name or a GGUF file.

    If it has no padding token, the end token pads, so that the vocabulary keeps its size. Raises `InvalidArgument` if
    it cannot be loaded, or has no end token to mark the end of a text.
    """
    source = source_of(name)
    try:
        if source.file is None:
            tokenizer = AutoTokenizer.from_pretrained(name, token=token, revision=revision)
        else:
            tokenizer = read_tokenizer(source)
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        refuse_to_load("tokenizer", name, error, token=token, remedy=_remedy_of(source))
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
    bits: int = 16,
    sharding: Sharding | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The causal language model of a folder, hub name or GGUF file, every parameter frozen, in evaluation mode.

    Args:
        name, token, revision: which model to load.
        dtype: data type of its weights and computation.
        device: where it computes.
        bits: 4 or 8 to quantise the model, else 16.
        sharding: how its weights are spread over the ranks; None loads all of them here.
        attention: how attention is computed, one of `utils.models.arguments.ATTENTION`; None leaves it to transformers.

    Raises:
        InvalidArgument: it cannot be loaded, or its checkpoint lacks weights (which would be random).
    """
    if sharding is not None:
        hub = {"token": token, "revision": revision}
        return load_sharded_model(
            name, **hub, dtype=dtype, device=torch.device(device), sharding=sharding, bits=bits, attention=attention
        )
    source = source_of(name)
    if bits != 16:
        refuse_gguf(name, "--model_name_or_path", f"--qbits {bits} does not read a GGUF file")
    quantized = quantized_loading(bits, dtype, device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.place,
            token=token,
            revision=revision,
            dtype=dtype,
            output_loading_info=True,
            attn_implementation=attention,
            **quantized,
            **source.dense,
        )
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        refuse_to_load("model", name, error, token=token, remedy=_remedy_of(source))
    missing = sorted(info["missing_keys"])
    if missing:
        refuse(
            "--model_name_or_path",
            name,
            f"its checkpoint lacks {counted(len(missing), 'weight')} such as {missing[0]}; {_REMEDY}",
        )
    model = model.requires_grad_(False).eval()
    keep_differentiable(model)
    round_rows_alone(model)
    return model if quantized else model.to(device)


def is_configuration(name: str) -> bool:
    """Whether a model's name is its configuration alone: a JSON file, or a folder that holds no other file."""
    path = Path(name)
    if path.is_file():
        return path.suffix == ".json"
    found = {one.name for one in path.iterdir() if not one.name.startswith(".")} if path.is_dir() else set()
    return "config.json" in found <= _CONFIGURATION


def load_skeleton(
    name: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model without its weights (on the meta device): names, shapes and configuration, in an instant.

    The configuration is enough, see `is_configuration`.

    Args:
        name, token, revision, attention: see `load_model`.
        dtype: what the model will compute in.

    Raises:
        InvalidArgument: it cannot be loaded, or cannot use this `attention`.
    """
    source = source_of(name)
    try:
        config = AutoConfig.from_pretrained(source.place, token=token, revision=revision, **source.which)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        refuse_to_load("model", name, error, token=token, remedy=_remedy_of(source))
    if attention is not None:
        _require_attention(config, attention, dtype)
    return skeleton


def _require_attention(config: PretrainedConfig, attention: str, dtype: torch.dtype) -> None:
    if attention == FLASH and dtype == torch.float32:
        refuse("--attn_implementation", attention, "it has no float32; set mixed_precision to bf16, or leave it out")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ImportError, ValueError) as error:  # not installed, or not for this model
        reason = " ".join(str(error).split())[:200]
        refuse("--attn_implementation", attention, f"this model cannot use it here ({reason}); leave it out")


def require_context(
    model: PreTrainedModel, block_size: int, *, flag: str = "--block_size", virtual_tokens: int = 0
) -> None:
    """Refuse a `block_size` that, with the virtual tokens before it, exceeds the model's context."""
    context = context_of(model)
    if context is not None and block_size + virtual_tokens > context:
        shared = f" for text and {virtual_tokens} virtual tokens" if virtual_tokens else ""
        most = context - virtual_tokens
        refuse(flag, block_size, f"the model's context is {context} tokens{shared}; give at most {most}")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. Hooks and frozen inputs need the non-reentrant kind."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def adapter_files(path: str) -> list[Path]:
    """The files that `load_adapter(path)` reads. Raises `InvalidArgument` if there is no adapter."""
    given = published_part(path)
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
    """Attach the adapter `path` to `model`; `merge` adds it to the weights. `InvalidArgument` if it doesn't fit."""
    attach_adapter(model, path)
    if merge:
        merge_lora(model)


def _remedy_of(source: GgufSource) -> str:
    return _REMEDY if source.file is None else GGUF_REMEDY


def refuse_to_load(
    what: str,
    name: str,
    error: Exception,
    *,
    token: str | None = None,
    flag: str = "--model_name_or_path",
    remedy: str = _REMEDY,
) -> NoReturn:
    """Refuse with one line of a library's error message, in which the token is hidden."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = f"{type(error).__name__}: {reason[:200]}"
    if token:
        reason = reason.replace(token, "***")
    refuse(flag, name, f"no {what} could be loaded ({reason}); {remedy}")
