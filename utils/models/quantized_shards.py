"""Frozen weights in 4 bits (NF4) or 8 (LLM.int8()) whose packed bytes are sharded over the ranks with FSDP2.

bitsandbytes keeps the scales of a weight in an object beside it, and 4-bit numbers as one flat column. FSDP would shard
the weight and not see its scales. Here both are ordinary parameters of the layer, with a row for each output:

- `weight`: uint8 [O, I / 2] with two numbers in a byte, or int8 [O, I];
- `scales`: the bytes of float32 numbers, uint8 [O, 4 * S]. S is I / 64, one for each block, or 1 in 8 bits.

FSDP casts nothing here (`shard` gives it no other precision), and from torch 2.13 on it never casts whole
numbers. A scale never reaches beyond its row. So each rank quantises the rows that it reads, and nobody needs the whole
weight: the packed bytes are those of the whole weight quantised at once. A layer hands the gathered bytes to
bitsandbytes' own product.

Shapes: I inputs, O outputs, r rows of a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, int8_vectorwise_quant, quantize_4bit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.quantizers.auto import AutoHfQuantizer

from dptune._validate import refuse
from dptune.sharding import from_rows, read_own_rows
from utils.models.quantization import quantized_loading

BLOCK = 64  # numbers of 4 bits that share a scale
_KIND = "nf4"
_SCALE = torch.float32


class ShardedLinear:
    """Mixin: a layer of bitsandbytes with its weight in parameters that FSDP can shard."""

    packed_dtype: ClassVar[torch.dtype]
    scales: nn.Parameter
    weight_dtype: torch.dtype  # of the weight before it is quantised, and after it is dequantised

    @staticmethod
    def widths(inputs: int) -> tuple[int, int]:
        """(packed numbers, scales) of a row."""
        raise NotImplementedError

    @staticmethod
    def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [r, I], r > 0 -> packed [r, ...] and float32 scales [r, S]."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(cast(nn.Module, self), destination, prefix, keep_vars)  # as any module does

    @property
    def own_scales(self) -> Tensor:
        """The gathered scales, float32 [O, S], in the memory of their bytes."""
        return self.scales.view(_SCALE)


class ShardedLinear4bit(ShardedLinear, bnb.nn.Linear4bit):
    """NF4, dequantised for every product."""

    packed_dtype = torch.uint8

    @staticmethod
    def widths(inputs: int) -> tuple[int, int]:
        """Two numbers in a byte, and a scale for 64 of them."""
        return inputs // 2, inputs // BLOCK

    @staticmethod
    def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised block by block."""
        packed, state = quantize_4bit(rows, blocksize=BLOCK, quant_type=_KIND)
        return packed.view(len(rows), -1), state.absmax.view(len(rows), -1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], as bitsandbytes computes it."""
        state = QuantState(
            absmax=self.own_scales.view(-1),
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=BLOCK,
            quant_type=_KIND,
            dtype=self.weight_dtype,
        )
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product = bnb.matmul_4bit(x.to(self.compute_dtype), self.weight.view(-1, 1), bias=bias, quant_state=state)
        output: Tensor = product.to(x.dtype)
        return output


class ShardedLinear8bit(ShardedLinear, bnb.nn.Linear8bitLt):
    """8 bits, with each token's activations scaled by that token alone: the threshold of outliers is 0."""

    packed_dtype = torch.int8

    @staticmethod
    def widths(inputs: int) -> tuple[int, int]:
        """One number in a byte, and one scale."""
        return inputs, 1

    @staticmethod
    def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised row by row."""
        packed, scales, _ = int8_vectorwise_quant(rows.to(torch.float16))
        return packed, scales.view(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], as bitsandbytes computes it."""
        state = bnb.MatmulLtState()
        state.threshold, state.has_fp16_weights, state.is_training = 0.0, False, self.training
        state.CB, state.SCB = self.weight, self.own_scales.view(-1)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        output: Tensor = bnb.matmul(x, self.weight, bias=bias, state=state)
        return output


_KINDS: dict[type, type[ShardedLinear]] = {
    bnb.nn.Linear4bit: ShardedLinear4bit,
    bnb.nn.Linear8bitLt: ShardedLinear8bit,
}


def quantize_skeleton(model: Any, bits: int, dtype: torch.dtype) -> None:
    """Replace each linear layer that transformers would quantise by one whose packed weight can be sharded.

    Args:
        model: the model on the meta device; changed in place.
        bits: 4 or 8.
        dtype: what the unquantised weights are read as, and what computes.

    Raises:
        InvalidArgument: a layer has rows that are no whole number of blocks, or is stored by columns.
    """
    config = quantized_loading(bits, dtype, "cpu")["quantization_config"]
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(model=model, device_map=None)
    for name, layer in model.named_modules():
        if type(layer) in _KINDS:
            _pack(layer, name, bits, dtype)


def packed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that `load_packed` fills."""
    return {f"{name}.{own}" for name in _layers(model) for own in ("weight", "scales")}


def load_packed(model: nn.Module, files: Mapping[str, Path], *, device: torch.device, prefix: str = "") -> None:
    """Fill the packed parameters of a sharded model. This rank reads and quantises only its own rows.

    Args:
        model: a model from `quantize_skeleton` and `shard`.
        files, prefix: see `load_slices`.
        device: the device of the shards, on which they are quantised.

    Raises:
        InvalidArgument: the checkpoint lacks a weight or has it in another shape.
    """
    for name, layer in _layers(model).items():
        shape = (layer.out_features, layer.in_features)
        like, scales_like = cast("tuple[DTensor, DTensor]", (layer.weight, layer.scales))
        rows = read_own_rows(files, f"{name}.weight", like, shape=shape, prefix=prefix)
        packed, scales = quantized_rows(layer, rows.to(device, layer.weight_dtype))
        layer.weight = nn.Parameter(from_rows(packed, like), requires_grad=False)
        layer.scales = nn.Parameter(from_rows(scales, scales_like), requires_grad=False)


def quantized_rows(kind: ShardedLinear | type[ShardedLinear], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [r, I] of a weight -> packed [r, ...] and the bytes of their scales, uint8 [r, 4 * S]."""
    if len(rows):
        packed, scales = kind.quantized(rows.contiguous())
        return packed, scales.contiguous().view(torch.uint8)
    widths = _widths(kind, rows.shape[1])  # more ranks than rows
    return rows.new_empty(0, widths[0], dtype=kind.packed_dtype), rows.new_empty(0, widths[1], dtype=torch.uint8)


def _pack(layer: Any, name: str, bits: int, dtype: torch.dtype) -> None:
    """Turn bitsandbytes' layer on the meta device into the sharded kind, in place."""
    if not issubclass(layer.source_cls, nn.Linear):
        refuse("--qbits", bits, f"{name} is stored by columns, which cannot be sharded in {bits} bits; give 16")
    if bits == 4 and layer.in_features % BLOCK:
        remedy = f"{name} has {layer.in_features} inputs, no multiple of {BLOCK}; give 8 or 16 to shard this model"
        refuse("--qbits", bits, remedy)
    layer.__class__ = _KINDS[type(layer)]
    layer.weight_dtype = dtype
    packed, scales = _widths(layer, layer.in_features)
    layer.weight = _on_meta(layer.out_features, packed)
    layer.scales = _on_meta(layer.out_features, scales)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)


def _widths(kind: ShardedLinear | type[ShardedLinear], inputs: int) -> tuple[int, int]:
    """(packed numbers, bytes of scales) of a row."""
    packed, scales = kind.widths(inputs)
    return packed, scales * _SCALE.itemsize


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ShardedLinear)}


def _on_meta(rows: int, width: int) -> nn.Parameter:
    """Holds the place of bytes. Before torch 2.13 FSDP wraps no whole numbers, but takes them when they are loaded."""
    return nn.Parameter(torch.empty(rows, width, dtype=torch.bfloat16, device="meta"), requires_grad=False)
