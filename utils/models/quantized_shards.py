"""Frozen weights in 4 bits (NF4) whose packed bytes are sharded over the ranks with FSDP2.

bitsandbytes keeps a packed weight as one flat column, and its scales in an object beside it. FSDP would shard the one
and not see the other. Here both are ordinary parameters of the layer, with a row for each output:

- `weight`, uint8 [O, I / 2]: two numbers of 4 bits in a byte;
- `scales`, uint8 [O, 4 * I / 64]: the bytes of a float32 for each block of 64 numbers.

FSDP never casts whole numbers, so the bytes of both survive any precision that it is given. A block never reaches
beyond its row, so each rank quantises the rows that it reads, and nobody needs the whole weight: the packed bytes are
those of the whole weight quantised at once. A layer hands the gathered bytes to bitsandbytes' own product.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.quantizers.auto import AutoHfQuantizer

from dptune._validate import refuse
from dptune.sharding import from_rows, read_rows
from utils.models.quantization import quantized_loading

BLOCK = 64  # numbers that share a scale
_KIND = "nf4"


class ShardedLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer with its weight in parameters that FSDP can shard; made by `pack` from one on meta."""

    scales: nn.Parameter
    weight_dtype: torch.dtype

    @classmethod
    def pack(cls, layer: Any, name: str, dtype: torch.dtype) -> None:
        """Turn a `Linear4bit` on the meta device into this class, in place.

        Args:
            layer: the layer.
            name: its name, for errors.
            dtype: the type of the weight before it is quantised, and after it is dequantised.

        Raises:
            InvalidArgument: its rows are no whole number of blocks, or the checkpoint stores it by columns.
        """
        if not issubclass(layer.source_cls, nn.Linear):
            refuse("--qbits", 4, f"{name} is stored by columns, which cannot be sharded in 4 bits; give 16")
        if layer.in_features % BLOCK:
            remedy = f"{name} has {layer.in_features} inputs, no multiple of {BLOCK}; give 16 to shard this model"
            refuse("--qbits", 4, remedy)
        layer.__class__ = cls
        layer.weight_dtype = dtype
        layer.weight = _bytes(layer.out_features, layer.in_features // 2)
        layer.scales = _bytes(layer.out_features, layer.in_features // BLOCK * torch.float32.itemsize)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], as bitsandbytes computes it."""
        state = QuantState(
            absmax=self.scales.view(torch.float32).view(-1),
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=BLOCK,
            quant_type=_KIND,
            dtype=self.weight_dtype,
        )
        computed = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        output: Tensor = bnb.matmul_4bit(computed, self.weight.view(-1, 1), bias=bias, quant_state=state)
        return output.to(x.dtype)


def quantize_skeleton(model: Any, dtype: torch.dtype) -> None:
    """Put `ShardedLinear4bit` in the place of those linear layers that transformers would quantise.

    Args:
        model: the model on the meta device; changed in place.
        dtype: what the unquantised weights are read as, and what computes.

    Raises:
        InvalidArgument: see `ShardedLinear4bit.pack`.
    """
    config = quantized_loading(4, dtype, "cpu")["quantization_config"]
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(model=model, device_map=None)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
            ShardedLinear4bit.pack(layer, name, dtype)


def packed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that `load_packed` fills."""
    return {f"{name}.{own}" for name in _layers(model) for own in ("weight", "scales")}


def load_packed(model: nn.Module, files: Mapping[str, Path], *, device: torch.device, prefix: str = "") -> None:
    """Fill the packed parameters of a sharded model. This rank reads and quantises only its own rows.

    Args:
        model: a model from `quantize_skeleton` and `shard_frozen`.
        files, prefix: see `load_slices`.
        device: the device of the shards, on which they are quantised.

    Raises:
        InvalidArgument: the checkpoint lacks a weight or has it in another shape.
    """
    for name, layer in _layers(model).items():
        shape = (layer.out_features, layer.in_features)
        like, scales_like = cast("tuple[DTensor, DTensor]", (layer.weight, layer.scales))
        rows = read_rows(files, f"{name}.weight", like, shape=shape, prefix=prefix)
        packed, scales = quantized_rows(rows.to(device, layer.weight_dtype))
        layer.weight = nn.Parameter(from_rows(packed, like), requires_grad=False)
        layer.scales = nn.Parameter(from_rows(scales, scales_like), requires_grad=False)


def quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(packed numbers uint8 [r, I / 2], bytes of their scales uint8 [r, 4 * I / 64]) of r rows [r, I]."""
    count, inputs = rows.shape
    if not count:  # more ranks than rows
        widths = (inputs // 2, inputs // BLOCK * torch.float32.itemsize)
        return tuple(torch.empty(0, width, dtype=torch.uint8, device=rows.device) for width in widths)  # type: ignore[return-value]
    packed, state = quantize_4bit(rows.contiguous(), blocksize=BLOCK, quant_type=_KIND)
    return packed.view(count, -1), state.absmax.view(count, -1).view(torch.uint8)


def _layers(model: nn.Module) -> dict[str, ShardedLinear4bit]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ShardedLinear4bit)}


def _bytes(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, width, dtype=torch.uint8, device="meta"), requires_grad=False)
