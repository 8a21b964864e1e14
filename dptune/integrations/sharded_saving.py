"""Writes a model with sharded weights as safetensors files, for `from_pretrained`. No rank ever holds the whole model.

All ranks gather one tensor at a time. Rank 0 keeps those of one file, and writes it when it is full.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from dptune.sharding import original_class_name, reshard

_FILE_BYTES = 2 << 30  # of one file, which rank 0 holds while it fills
_FILES = "model{suffix}.safetensors"


def write_sharded(model: Any, folder: Path | None) -> None:
    """Write configuration and weights to a folder, which is made. Every rank calls this; all but rank 0 with None.

    Tied weights are written once, as `save_pretrained` does. Weights that an earlier call left in the folder are
    removed, if this one gives its files other names.
    """
    reshard(model)
    tensors = _named_tensors(model)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern=_FILES,
        max_shard_size=_FILE_BYTES,
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_others(folder, {*plan.filename_to_tensors, *([SAFE_WEIGHTS_INDEX_NAME] if plan.is_sharded else [])})
        _write_configuration(model, folder)
    for file, names in plan.filename_to_tensors.items():
        kept: dict[str, Tensor] = {}
        for name in names:
            whole = _whole(tensors[name])
            if folder is not None:
                kept[name] = whole.cpu().contiguous()
        if folder is not None:
            save_file(kept, folder / file, metadata={"format": "pt"})
    if folder is not None and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _remove_others(folder: Path, wanted: Collection[str]) -> None:
    """Remove weights under other names: `from_pretrained` might read them instead."""
    for path in [*folder.glob("model*.safetensors"), *folder.glob(SAFE_WEIGHTS_INDEX_NAME)]:
        if path.name not in wanted:
            path.unlink()


def _named_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of the state dict, shared ones under their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach()))
    return dict(found.values())


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _write_configuration(model: Any, folder: Path) -> None:
    model.config.architectures = [original_class_name(model)]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
