"""Refuses quantised layers in which other examples change how an example's activations are rounded.

Some quantised layers round only their weights; others round their input too. If each token is scaled by its own values,
an example's gradient depends on that example alone. If one scale, or one choice of columns, serves the whole
micro-batch, every example affects how the others are rounded. No comparison of gradients in low precision finds that
reliably. So the layer types that are known to be harmless are listed here, and all others are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dptune._validate import Described, refuse

# Packages whose layers compute with quantised numbers, as prefixes of a class's module.
_PACKAGES = (
    "aqlm",
    "auto_gptq",
    "auto_round",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "fbgemm_gpu",
    "fp_quant",
    "gptqmodel",
    "hqq",
    "optimum.quanto",
    "quark",
    "quanto",
    "spqr_quant",
    "torch.ao",
    "torchao",
    "transformer_engine",
    "transformers.integrations",
    "vptq",
)
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32)  # of buffers; int64 holds positions, bool masks


def _always(_: Any) -> bool:
    return True


def _without_outliers(layer: Any) -> bool:
    return float(layer.state.threshold) == 0.0


def _weights_only(layer: Any) -> bool:
    return getattr(layer, "act_bits", None) is None


# (package, class) -> whether this layer rounds weights only, or each token's activations by that token alone.
_KNOWN: dict[tuple[str, str], Callable[[Any], bool]] = {
    ("bitsandbytes", "Linear4bit"): _always,
    ("bitsandbytes", "Embedding4bit"): _always,
    ("bitsandbytes", "Embedding8bit"): _always,
    ("bitsandbytes", "Linear8bitLt"): _without_outliers,
    ("bitsandbytes", "Embedding"): _always,  # of 32 bits, for 8-bit optimizers
    ("bitsandbytes", "StableEmbedding"): _always,
    ("hqq", "HQQLinear"): _weights_only,
    ("transformers", "BitLinear"): _always,  # one scale per token
    ("transformers", "AutoBitLinear"): _always,
    ("transformers", "EetqLinear"): _always,  # weights only
    ("transformers", "FbgemmFp8Linear"): _always,  # one scale per token
    ("transformers", "HiggsLinear"): _always,  # weights only
}


def require_separate_rounding(model: nn.Module) -> None:
    """Refuse a quantised layer, trained or frozen, in which an example may change how another one is rounded.

    Raises:
        InvalidArgument: the layer's name and type, and what to use.
    """
    for name, layer in model.named_modules():
        kinds = [kind for kind in type(layer).__mro__ if issubclass(kind, nn.Module) and _package_of(kind)]
        if not kinds and not any(map(_is_packed, _own_tensors(layer))):
            continue
        known = next(((kind, test) for kind in kinds if (test := _KNOWN.get(_key(kind)))), None)
        if known is None:
            _refuse_unknown(name, kinds[0] if kinds else type(layer))
        if not known[1](layer):
            _refuse_coupled(name, known[0], layer)


def _package_of(kind: type) -> str | None:
    """The package of quantised layers that a class belongs to."""
    module = f"{kind.__module__}."
    return next((package for package in _PACKAGES if module.startswith(f"{package}.")), None)


def _key(kind: type) -> tuple[str, str]:
    return kind.__module__.partition(".")[0], kind.__name__


def _own_tensors(layer: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers of numbers; rows of positions and masks are no weights."""
    yield from layer.parameters(recurse=False)
    for buffer in layer.buffers(recurse=False):
        if buffer.ndim > 1 and (buffer.is_floating_point() or buffer.dtype in _PACKED or buffer.is_quantized):
            yield buffer


def _is_packed(tensor: Tensor) -> bool:
    """Whether it holds quantised numbers: integers, 8-bit floats, or a library's own kind of tensor."""
    if type(tensor).__module__.partition(".")[0] != "torch":
        return True
    return tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.element_size() == 1


def _refuse_unknown(name: str, kind: type) -> NoReturn:
    reason = "is quantised, and it is not known to round each token's activations by that token alone"
    remedy = "one example could change how others are rounded; use a base in 16 bits, or bitsandbytes in 4"
    refuse(name or "model", Described(kind.__name__), f"{reason}, so {remedy}")


def _refuse_coupled(name: str, kind: type, layer: Any) -> NoReturn:
    if kind.__name__ != "Linear8bitLt":
        _refuse_unknown(name, kind)
    reason = (
        f"its outlier threshold of {layer.state.threshold:g} looks at the whole micro-batch, which couples examples"
    )
    remedy = "load it with llm_int8_threshold=0.0, or set the layer's state.threshold to 0"
    refuse(name or "model", Described(kind.__name__), f"{reason}; {remedy}")
