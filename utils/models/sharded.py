"""A transformers model whose weights are sharded over the ranks. Each rank reads only its own rows."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dptune._validate import refuse
from dptune.sharding import ShardedBytes, checkpoint_files, load_slices, original_class_name, shard, weight_bytes
from utils.cli.launch import Sharding
from utils.models.gguf import refuse_gguf
from utils.models.quantization import require_available


def load_sharded_model(
    name: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device,
    sharding: Sharding,
    bits: int = 16,
    attention: str | None = None,
) -> PreTrainedModel:
    """The causal language model of a folder or hub name, frozen, sharded over all ranks, in evaluation mode.

    With 4 or 8 `bits` the packed bytes are sharded (`utils.models.quantized_shards`). For `attention` see
    `utils.models.loading.load_model`. The checkpoint must be in safetensors files. Raises `InvalidArgument` if it is
    not, or lacks weights, or has weights that cannot be sharded in so few bits.
    """
    require_available(bits)
    refuse_gguf(name, "--model_name_or_path", "the weights of a GGUF file cannot be sharded")
    folder = _local_folder(name, token, revision)
    config = AutoConfig.from_pretrained(folder)
    # Buffers keep their values: those of rotary embeddings are in no checkpoint.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # undone by the context above
    if bits != 16:
        from utils.models.quantized_shards import load_packed, packed_names, quantize_skeleton

        quantize_skeleton(model, bits, dtype)
    model.requires_grad_(False).eval()
    shard(
        model,
        decoder_layers(model),
        device=device,
        cpu_offload=sharding.cpu_offload,
        reshard_after_forward=sharding.reshard_after_forward,
    )
    shards = torch.device("cpu") if sharding.cpu_offload else device
    files, prefix = checkpoint_files(folder), f"{model.base_model_prefix}."
    if bits != 16:
        load_packed(model, files, device=shards, prefix=prefix)
    load_slices(model, files, device=shards, prefix=prefix, apart=() if bits == 16 else packed_names(model))
    return model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers keeps whole on one device."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if original_class_name(module) in names]


def describe_shards(model: PreTrainedModel, ranks: int) -> str:
    """A printed line about the weights on this rank. `RuntimeError` if they are more than a shard."""
    held = weight_bytes(model, decoder_layers(model))
    held.require_bound(ranks)
    return _line(held, ranks)


def _line(held: ShardedBytes, ranks: int) -> str:
    mib = 2.0**20
    return (
        f"sharded weights        {held.held / mib:,.1f} MiB per rank of {held.total / mib:,.1f} MiB over {ranks} "
        f"processes (at most {held.total / ranks / mib:,.1f} + root group {held.root / mib:,.1f})"
    )


def _local_folder(name: str, token: str | None, revision: str | None) -> Path:
    """The folder of the checkpoint; downloads it if `name` is a hub name."""
    if Path(name).is_dir():
        return Path(name)
    try:
        wanted: list[str] = ["*.json", "*.safetensors"]
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises unrelated types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        refuse("--model_name_or_path", name, f"could not be downloaded ({reason}); give a folder or a hub name")
