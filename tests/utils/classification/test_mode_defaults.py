"""The names of the modes and their default rates."""

from __future__ import annotations

import pytest

from utils.classification.mode_defaults import (
    MODES,
    ModelRates,
    default_head_learning_rate,
    default_learning_rate,
    plain_whole_rate,
    virtual_tokens,
)

OF_MODEL = ModelRates(head=lambda: 0.05, whole=lambda: 1e-3)


def test_every_mode_has_a_learning_rate_and_a_known_number_of_virtual_tokens() -> None:
    for mode in MODES:
        for private in (True, False):
            assert 1e-5 < default_learning_rate(mode, OF_MODEL, private=private) < 0.1
        assert virtual_tokens(mode, 5) == (5 if "prefix" in mode or "prompt" in mode else 0)


def test_a_private_head_trains_at_its_own_rate_beside_adapters_alone() -> None:
    def rate(mode: str, *, private: bool) -> float:
        return default_head_learning_rate(mode, OF_MODEL, rate=1e-3, private=private)

    assert (rate("lora", private=True), rate("lora", private=False)) == (0.05, 1e-3)
    assert rate("full", private=True) == rate("last-layer", private=True) == 1e-3


@pytest.mark.parametrize(("width", "rate"), [(128, 1e-4), (384, 1e-4), (768, 5.2e-5), (1024, 3.9e-5)])
def test_a_wide_model_learns_slowly_without_privacy(width: int, rate: float) -> None:
    assert plain_whole_rate(width) == rate
