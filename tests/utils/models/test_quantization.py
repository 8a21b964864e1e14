"""Models in 4 and 8 bits: gradients are those of the dequantised weights, and examples do not affect each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dptune import CausalLMLoss, add_lora
from dptune._validate import InvalidArgument
from dptune.per_example import PerExampleGradients, hooks
from tests.examples import padded, random_examples, randomise_adapters
from tests.reference import Example
from tests.tiny import save_tiny
from utils.cli.flags import parse
from utils.models import quantization
from utils.models.arguments import ModelArguments
from utils.models.loading import load_model
from utils.models.quantization import quantized_loading, require_available

CPU = torch.device("cpu")
HUGE = 399  # a token whose activations are above the threshold of LLM.int8(), 6
EXAMPLES = random_examples(5, seed=4, vocab_size=HUGE)
OUTLIER: Example = ([HUGE] * 6, [-100] * 3 + [HUGE] * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 dimensions, the block of NF4."""
    return save_tiny(tmp_path_factory.mktemp("wide"), hidden=64)


def adapted(model: Any) -> Any:
    """With random adapters, and a token whose activations are over the threshold."""
    with torch.no_grad():
        own = model.get_input_embeddings().weight[HUGE]
        own.zero_()
        own[3] = 100.0  # all in one dimension: the square root of 64 behind a norm
    add_lora(model, rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
    randomise_adapters(model)
    return model


def quantized(folder: Path, bits: int) -> Any:
    return load_model(str(folder), dtype=torch.float32, device=CPU, bits=bits)


def dequantized(folder: Path, model: nn.Module) -> Any:
    """A float32 model with the dequantised weights."""
    plain = load_model(str(folder), dtype=torch.float32, device=CPU)
    for name, layer in model.named_modules():
        held: Any = getattr(layer, "weight", None)
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(held.data, held.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            weight = held.CB.float() * held.SCB[:, None] / 127
        else:
            continue
        assert (weight - plain.get_submodule(name).weight).norm() > 1e-4 * weight.norm()
        plain.get_submodule(name).weight.data = weight
    return plain


def gradients(model: nn.Module, examples: list[Example]) -> Tensor:
    """[B, P]."""
    with PerExampleGradients(model) as recorder:
        CausalLMLoss(model)(*padded(examples)).sum().backward()
        return torch.cat([grad.flatten(1) for grad in recorder.take().materialised().values()], dim=1)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize(("bits", "kind"), [(4, bnb.nn.Linear4bit), (8, bnb.nn.Linear8bitLt)])
def test_the_decoder_is_quantised_and_frozen_and_the_adapters_are_float32(folder: Path, bits: int, kind: type) -> None:
    model = quantized(folder, bits)
    layers = [module for name, module in model.model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 2 * 7
    assert all(isinstance(layer, kind) for layer in layers)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = [p for p in adapted(model).parameters() if p.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-5), (8, 0.02)])
def test_gradients_are_those_of_the_dequantised_weights(folder: Path, bits: int, tolerance: float) -> None:
    """In 8 bits activations are rounded too, in the forward pass only."""
    model = quantized(folder, bits)
    plain = dequantized(folder, model)
    add_lora(model, rank=4, alpha=8.0)
    add_lora(plain, rank=4, alpha=8.0)
    randomise_adapters(model)
    randomise_adapters(plain)
    assert relative(gradients(model, EXAMPLES), gradients(plain, EXAMPLES)) < tolerance


def repacked(model: nn.Module) -> list[str]:
    """4-bit layers whose weights have the layout that no gradient passes through, after a measurement."""
    with torch.no_grad():
        CausalLMLoss(model)(*padded(EXAMPLES))
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit))
    return [name for name, layer in layers if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)]


def test_a_measurement_does_not_end_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX512-BF16, whichever this is."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    assert repacked(quantized(folder, 4)) == []
    config = quantized_loading(4, torch.float32, CPU)
    as_loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()
    assert len(repacked(as_loaded)) == 2 * 7


def with_threshold(folder: Path, threshold: float) -> Any:
    """8 bits, with what `quantized_loading` turns off."""
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return model.requires_grad_(False).eval()


def moved_by_a_neighbour(model: Any) -> float:
    """How far gradients change when an example with huge activations joins the micro-batch, relative."""
    adapted(model)
    alone = gradients(model, EXAMPLES)
    return relative(gradients(model, [*EXAMPLES, OUTLIER])[:-1], alone)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_examples_gradient_does_not_depend_on_a_neighbours_outliers(folder: Path, bits: int) -> None:
    assert moved_by_a_neighbour(quantized(folder, bits)) < 1e-5


def test_with_an_outlier_threshold_it_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "require_separate_rounding", lambda _: None)
    assert moved_by_a_neighbour(with_threshold(folder, 6.0)) > 1e-3


@pytest.mark.parametrize("bits", [8, 16])
def test_a_checkpoint_in_eight_bits_loses_its_own_threshold(folder: Path, bits: int, tmp_path: Path) -> None:
    """transformers prefers the checkpoint's settings to ours. The engine refuses what was not loaded here."""
    with_threshold(folder, 6.0).save_pretrained(tmp_path)
    as_it_comes = adapted(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    with pytest.raises(InvalidArgument, match="outlier threshold of 6"):
        PerExampleGradients(as_it_comes)
    assert moved_by_a_neighbour(quantized(tmp_path, bits)) < 1e-5


def test_sixteen_bits_ask_for_nothing() -> None:
    assert quantized_loading(16, torch.bfloat16, CPU) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_compute_in_the_given_dtype(dtype: torch.dtype) -> None:
    config = quantized_loading(4, dtype, "cuda:1")
    assert config["quantization_config"].bnb_4bit_compute_dtype is dtype
    assert config["device_map"] == {"": torch.device("cuda:1")}


@pytest.mark.parametrize("bits", [4, 8])
def test_without_bitsandbytes_it_is_one_line(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _name: None)
    for ask in (
        lambda: require_available(bits),
        lambda: quantized_loading(bits, torch.float32, CPU),
        lambda: parse(ModelArguments, args=["--model_name_or_path", "m", "--qbits", str(bits)]),
    ):
        with pytest.raises(InvalidArgument, match=f"^--qbits={bits}: .*pip install bitsandbytes") as error:
            ask()
        assert "\n" not in str(error.value)
    require_available(16)


def test_eight_bits_do_not_fill_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    gradients(adapted(quantized(folder, 8)), EXAMPLES)
    assert "MatMul8bitLt" not in caplog.text
