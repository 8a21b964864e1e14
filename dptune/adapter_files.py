"""Adapter files: `lora_weights.bin`, a plain state dict, and the same adapter in the PEFT library's format.

The plain file has the keys `<layer>.lora.A.weight` [R, I], `<layer>.lora.B.weight` [O, R] and `<layer>.lora.alpha` [],
which is R times the scale. So rank, scale and adapted layers can be read from the file alone.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dptune._files import atomic_write
from dptune._validate import Described, refuse
from dptune.lora import LoraAdapter, adapters, attach, is_conv1d, linear_layers, linear_sizes
from dptune.peft_format import read_settings, refuse_unused
from dptune.published import published_part

WEIGHTS_NAME = "lora_weights.bin"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"

_PEFT_PREFIX = "base_model.model."
_ANOTHER_MODEL = "it belongs to another model; give that model, or an adapter of this one"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of `model` as a plain state dict, on the CPU."""
    state: dict[str, Tensor] = {}
    for layer, adapter in adapters(model):
        state[f"{layer}.lora.A.weight"] = adapter.A.weight.detach().cpu().clone()
        state[f"{layer}.lora.B.weight"] = adapter.B.weight.detach().cpu().clone()
        state[f"{layer}.lora.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float64)
    return state


def torch_bytes(value: object) -> memoryview:
    """The bytes that `torch.save` writes. On a full disk, `torch.save` to a file would raise a misleading error."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def save_adapter(model: nn.Module, folder: str | PathLike[str], *, base_model: str) -> None:
    """Write `lora_weights.bin`, `adapter_model.safetensors` and `adapter_config.json`, each whole or not at all.

    Args:
        model: a model with adapters, merged or not.
        folder: where the files go; must exist.
        base_model: name or path of the base model, for PEFT's configuration.

    Raises:
        InvalidArgument: the adapters differ in rank or alpha; nothing is written then.
    """
    folder = Path(folder)
    found = dict(adapters(model))
    transposed = any(is_conv1d(model.get_submodule(name)) for name in found)
    config = _peft_config(found, base_model, transposed)  # first: it may refuse
    peft_weights = {
        f"{_PEFT_PREFIX}{name}.lora_{part}.weight": getattr(adapter, part).weight.detach().cpu().contiguous()
        for name, adapter in found.items()
        for part in "AB"
    }
    with atomic_write(folder / WEIGHTS_NAME, "wb") as file:
        file.write(torch_bytes(adapter_state_dict(model)))
    with atomic_write(folder / PEFT_WEIGHTS_NAME, "wb") as file:
        file.write(safetensors_bytes(peft_weights, metadata={"format": "pt"}))
    with atomic_write(folder / PEFT_CONFIG_NAME) as file:
        json.dump(config, file, indent=2)


def require_savable(model: nn.Module) -> None:
    """Raise the `InvalidArgument` of `save_adapter` for adapters that differ in rank or alpha, before they train."""
    _peft_config(dict(adapters(model)), "", any_transposed=False)


def attach_adapter(model: nn.Module, path: str | PathLike[str], *, dropout: float = 0.0) -> None:
    """Load an adapter file into `model`. If the model has no adapters, they are attached as the file describes them.

    Args:
        model: the base model, or a model whose adapters have the file's layers and shapes.
        path: `lora_weights.bin`, a PEFT folder or the `adapter_model.safetensors` in one, or a finished run's folder.
        dropout: of adapters that are attached here, see `add_lora`.

    Raises:
        InvalidArgument: there is no such file, it is not an adapter file, it holds more than A and B of linear layers,
            or it is for another model or rank. `model` is unchanged then.
    """
    loaded, copied = _read_adapter(published_part(path))
    present = dict(adapters(model))
    if merged := [name for name, adapter in present.items() if adapter.replaced_weight is not None]:
        refuse("model", merged[0], "its adapter is merged; call unmerge_lora first")
    for name, entry in loaded.items():
        _check_fits(model, name, entry, present)
    for key, weight in copied.items():
        _require_own(model, str(path), key, weight)
    if present.keys() - loaded.keys():
        refuse("path", str(path), f"has no weights for the model's adapter on {min(present.keys() - loaded.keys())}")
    if not present:
        attach(model, {name: (len(entry.A), entry.alpha) for name, entry in loaded.items()}, dropout=dropout)
    with torch.no_grad():
        for name, adapter in adapters(model):
            adapter.A.weight.copy_(loaded[name].A)
            adapter.B.weight.copy_(loaded[name].B)


def _peft_config(found: Mapping[str, LoraAdapter], base_model: str, any_transposed: bool) -> dict[str, object]:
    (rank, alpha, by_root), *others = {(one.rank, one.given_alpha, one.by_root) for one in found.values()}
    if others:
        kinds = f"rank {rank} and alpha {alpha:g}, rank {others[0][0]} and alpha {others[0][1]:g}"
        refuse("model", Described(kinds), "PEFT's format has one rank and alpha; give all adapters the same")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": by_root,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any_transposed,  # only for PEFT's merging; A and B are stored the same way
        "bias": "none",
        "target_modules": sorted(found),
        "inference_mode": True,
    }


class _Entry(NamedTuple):
    """The adapter of one layer in a file: A [R, I], B [O, R]."""

    A: Tensor
    B: Tensor
    alpha: float


_Read = tuple[dict[str, _Entry], dict[str, Tensor]]  # adapters by layer; what else the file holds, by its key


def _read_adapter(path: Path) -> _Read:
    """The adapters of a file, and the base's weights that PEFT's format may copy: of an adapted head, for example."""
    if path.is_dir() and (path / PEFT_CONFIG_NAME).exists():
        return _read_peft(path / PEFT_WEIGHTS_NAME)
    if path.is_dir() and (path / WEIGHTS_NAME).exists():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        refuse("path", str(path), f"no adapter there; give a {WEIGHTS_NAME} file or a PEFT folder")
    if path.suffix == ".safetensors":
        return _read_peft(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler fails on a damaged file with KeyError, IndexError, TypeError, OSError and others
        refuse("path", str(path), f"not a state dict that loads with weights_only=True; give a {WEIGHTS_NAME} file")
    if not isinstance(state, dict):
        refuse("path", str(path), f"holds no state dict; give a {WEIGHTS_NAME} file")
    keys = ("{}.lora.A.weight", "{}.lora.B.weight")
    entries, others = _entries(path, state, *keys, lambda name: state.get(f"{name}.lora.alpha"))
    if others:
        refuse_unused(str(path), min(others, key=str))
    return entries, {}


def _read_peft(path: Path) -> _Read:
    try:
        state = load_file(path)
        config = json.loads((path.parent / PEFT_CONFIG_NAME).read_text())
    except (OSError, SafetensorError, ValueError) as error:
        refuse("path", str(path.parent), f"not a readable PEFT adapter ({type(error).__name__})")
    settings = read_settings(config, str(path.parent))
    keys = (_PEFT_PREFIX + "{}.lora_A.weight", _PEFT_PREFIX + "{}.lora_B.weight")
    entries, others = _entries(path, state, *keys, settings.alpha_of)
    for name, entry in entries.items():
        if len(entry.A) != settings.rank_of(name):
            told = f"{len(entry.A)} in its weights and {settings.rank_of(name)} in its {PEFT_CONFIG_NAME}"
            refuse("path", str(path.parent), f"the rank of {name} is {told}; save the adapter again")
    return entries, others


def _entries(path: Path, state: Mapping[str, Any], A_key: str, B_key: str, alpha_of: Callable[[str], object]) -> _Read:
    """The adapters of `state`, and its other entries."""
    before, after = A_key.split("{}")
    keys = [key for key in state if isinstance(key, str) and key.startswith(before) and key.endswith(after)]
    names = [key[len(before) : -len(after)] for key in keys]
    if not names:
        refuse("path", str(path), "holds no LoRA weights")
    entries = {}
    for name in names:
        A, B, alpha = state[A_key.format(name)], state.get(B_key.format(name)), _number(alpha_of(name))
        if not (_is_matrix(A) and _is_matrix(B) and 0 < len(A) == B.shape[1] and alpha is not None):
            refuse("path", str(path), f"the adapter of {name} is incomplete or damaged; save it again")
        entries[name] = _Entry(A, B, alpha)
    known = {pattern.format(name) for name in names for pattern in (A_key, B_key, "{}.lora.alpha")}
    return entries, {key: value for key, value in state.items() if key not in known}


def _require_own(model: nn.Module, path: str, key: str, weight: Tensor) -> None:
    """Refuse an entry of a PEFT file that is no copy of the model's own weight: nothing would use it."""
    name = key.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
    own = dict(model.named_parameters(remove_duplicate=False)).get(name) if key.startswith(_PEFT_PREFIX) else None
    if own is None:
        refuse_unused(path, key)
    if own.is_meta:  # no values to compare: a skeleton
        return
    whole = (own.full_tensor() if isinstance(own, DTensor) else own.detach()).cpu()
    same = torch.equal(weight.to(whole.dtype), whole) or torch.equal(weight, whole.to(weight.dtype))
    if not same:  # in the precision of either
        remedy = "such as an enlarged vocabulary or a trained one; give the base that the adapter was trained on"
        refuse("path", path, f"{key} differs from the model's own weight, {remedy}, or merge it into that with PEFT")


def _is_matrix(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def _number(value: object) -> float | None:
    """`value` if it is a finite number above 0, plain or in a tensor; otherwise None."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None


def _check_fits(model: nn.Module, name: str, entry: _Entry, present: Mapping[str, LoraAdapter]) -> None:
    layer = linear_layers(model).get(name)
    if layer is None:
        refuse("path", name, f"the file adapts a layer that this model does not have: {_ANOTHER_MODEL}")
    shape, expected = (entry.A.shape[1], len(entry.B)), linear_sizes(layer)
    if shape != expected:
        refuse(
            "path",
            name,
            f"the file's adapter is {shape[0]} -> {shape[1]}, the layer {expected[0]} -> {expected[1]}: "
            f"{_ANOTHER_MODEL}",
        )
    if not present:
        return
    if name not in present:
        refuse("path", name, "the file adapts this layer, but the model does not: use the same targets")
    known = present[name]
    if (known.rank, known.alpha) != (len(entry.A), entry.alpha):
        refuse(
            "path",
            name,
            f"the file has rank {len(entry.A)} and alpha {entry.alpha:g}, but the model has rank {known.rank} and "
            f"alpha {known.alpha:g}: use the same rank and alpha",
        )
