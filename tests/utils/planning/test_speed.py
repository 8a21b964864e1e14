"""The estimate counts the operations of matrix products, and a measured speed stands as it is."""

from __future__ import annotations

import pytest

from dptune.lora import add_lora
from tests.tiny import tiny_llama
from utils.models.known_devices import find_device
from utils.planning.speed import EFFICIENCY, NOISE_PER_SECOND, Speed, estimated_speed, flops_per_token, measured_speed

TOKENS = 100
HIDDEN, LAYERS, VOCABULARY = 32, 2, 400
ATTENTION = 4 * LAYERS * HIDDEN * TOKENS  # of a forward pass, per token


def numbers(model: object) -> tuple[int, int]:
    """(parameters that multiply, trained ones)."""
    every = sum(one.numel() for one in model.parameters())  # type: ignore[attr-defined]
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)  # type: ignore[attr-defined]
    return every - HIDDEN * VOCABULARY, trained


def test_a_whole_model_takes_six_operations_per_parameter_and_token() -> None:
    model = tiny_llama()
    every, trained = numbers(model)
    expected = 4 * every + 2 * trained + 3 * ATTENTION
    assert trained == every + HIDDEN * VOCABULARY
    assert flops_per_token(model, TOKENS, recompute=False) == pytest.approx(expected)
    assert flops_per_token(model, TOKENS, recompute=True) == pytest.approx(expected + 2 * every + ATTENTION)


def test_adapters_take_four_and_a_tied_embedding_multiplies() -> None:
    model = tiny_llama(tie=True).requires_grad_(False)
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    every = sum(one.numel() for one in model.parameters())
    _, trained = numbers(model)
    assert trained < every / 50
    assert flops_per_token(model, TOKENS, recompute=False) == pytest.approx(4 * every + 2 * trained + 3 * ATTENTION)


def test_an_estimate_is_a_share_of_the_peak_of_all_devices() -> None:
    model, device = tiny_llama(), find_device("A100 80GB")
    speed = estimated_speed(model, TOKENS, device, 2, recompute=False)
    assert speed.tokens_per_second == pytest.approx(
        EFFICIENCY * 2 * 312e12 / flops_per_token(model, TOKENS, recompute=False)
    )
    assert speed.step_seconds == pytest.approx(sum(one.numel() for one in model.parameters()) / NOISE_PER_SECOND)
    assert "30% (assumed) of the peak of 2 x A100 80GB, 312 teraflops each" in speed.told


def test_a_step_takes_its_tokens_and_its_noise() -> None:
    assert Speed(500.0, 2.0, "").seconds(10, 100.0) == 4.0
    measured = measured_speed(1234.0)
    assert measured.seconds(1234, 1.0) == 1.0
    assert measured.told == "1,234 tokens per second, as given"


def test_a_device_without_a_peak_is_our_mistake() -> None:
    with pytest.raises(RuntimeError, match="without a known peak"):
        estimated_speed(tiny_llama(), TOKENS, find_device("my card 24GB"), 1, recompute=False)
