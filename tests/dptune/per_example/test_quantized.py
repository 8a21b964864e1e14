"""A quantised base is taken if each token's activations are rounded by that token alone, and refused otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear
from transformers.integrations.finegrained_fp8 import FP8Linear

from dptune import InvalidArgument, Ledger, PrivacyConfig, PrivateStep, add_lora
from dptune.per_example import PerExampleGradients
from tests.dptune.integrations.runs import dp_trainer, lora_llama, plain_trainer


def eight_bits(threshold: float) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(8, 8, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict({"weight": torch.randn(8, 8)})
    return layer.to("cpu")


def in_the_module(kind: type, module: str) -> type:
    """A class that says it comes from there."""
    return type(kind.__name__, (kind,), {"__module__": module})


class _Wrapped(Tensor):
    """As torchao holds a weight whose layer rounds its activations."""


class _Packed(nn.Module):
    """GPTQ's layout: integers in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))


class _HQQ(nn.Linear):
    def __init__(self, act_bits: int | None) -> None:
        super().__init__(8, 8)
        self.act_bits = act_bits


def float8() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def of_torchao() -> nn.Module:
    layer = nn.Linear(8, 8)
    kind = in_the_module(_Wrapped, "torchao.quantization.linear_activation_quantized_tensor")
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(kind), requires_grad=False)
    return layer


def hqq(act_bits: int | None) -> nn.Module:
    kind = in_the_module(_HQQ, "hqq.core.quantize")
    kind.__name__ = "HQQLinear"
    return kind(act_bits)


def with_(layer: nn.Module, trained: str = "0") -> nn.Module:
    """A model with the layer behind one that is adapted."""
    model = nn.Sequential(nn.Linear(8, 8), layer)
    add_lora(model, rank=2, targets=[trained])
    return model


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "Linear8bitLt: its outlier threshold of 6 looks at the whole micro-batch": lambda: eight_bits(6.0),
    "_Packed: is quantised": _Packed,
    "Linear: is quantised": float8,
    "FP8Linear: is quantised": lambda: FP8Linear(8, 8, block_size=None),
    "HQQLinear: is quantised": lambda: hqq(8),
    "FakeQuantize: is quantised": lambda: torch.ao.quantization.FakeQuantize(),
}
TAKEN: dict[str, Callable[[], nn.Module]] = {
    "8 bits without a threshold": lambda: eight_bits(0.0),
    "4 bits": lambda: bnb.nn.LinearNF4(8, 8),
    "ternary weights": lambda: AutoBitLinear(8, 8),
    "HQQ": lambda: hqq(None),
    "bfloat16": lambda: nn.Linear(8, 8, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_layer_that_may_round_by_the_whole_micro_batch_is_refused_by_name(reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^1={reason}") as error:
        PerExampleGradients(with_(REFUSED[reason]()))
    assert "\n" not in str(error.value)


def test_a_weight_of_a_librarys_own_kind_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^1=Linear: is quantised"):
        PerExampleGradients(with_(of_torchao()))


@pytest.mark.parametrize("name", TAKEN)
def test_a_layer_that_rounds_each_token_by_itself_is_taken(name: str) -> None:
    assert PerExampleGradients(with_(TAKEN[name]())).parameters


def test_a_layer_under_an_adapter_is_looked_at_too() -> None:
    with pytest.raises(InvalidArgument, match=r"^1=Linear8bitLt: its outlier threshold"):
        PerExampleGradients(with_(eight_bits(6.0), trained="1"))


def test_positions_and_masks_are_no_weights() -> None:
    model = with_(nn.LayerNorm(8))
    model.register_buffer("position_ids", torch.arange(8).expand(1, -1))
    model.register_buffer("seen", torch.ones(1, 1, 8, 8, dtype=torch.bool))
    assert PerExampleGradients(model).parameters


@pytest.mark.parametrize("door", ["step", "trainer", "callback"])
def test_every_front_door_refuses_it(door: str, tmp_path: Path) -> None:
    model = lora_llama()
    model.model.layers[0].mlp.up_proj = eight_bits(6.0)
    with pytest.raises(InvalidArgument, match=r"^model.layers.0.mlp.up_proj=Linear8bitLt: its outlier threshold"):
        open_door(door, model, tmp_path)


def open_door(door: str, model: Any, folder: Path) -> None:
    if door == "step":
        config = PrivacyConfig(
            num_examples=8, expected_batch_size=8.0, steps=1, clip_norm=1.0, noise_multiplier=1.0, delta=1e-3
        )
        PrivateStep(model, config, ledger=Ledger(folder / "ledger.jsonl"))
    elif door == "trainer":
        dp_trainer(folder, model).train()
    else:
        plain_trainer(folder, model)[0].train()
