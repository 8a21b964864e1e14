"""The names of the modes and their default rates."""

from __future__ import annotations

from utils.classification.mode_defaults import (
    MODES,
    default_head_learning_rate,
    default_learning_rate,
    virtual_tokens,
)


def test_every_mode_has_a_learning_rate_and_a_known_number_of_virtual_tokens() -> None:
    for mode in MODES:
        for private in (True, False):
            assert 1e-5 < default_learning_rate(mode, lambda: 0.05, private=private) < 0.1
        assert virtual_tokens(mode, 5) == (5 if "prefix" in mode or "prompt" in mode else 0)


def test_a_private_head_trains_at_its_own_rate_beside_adapters_alone() -> None:
    def rate(mode: str, *, private: bool) -> float:
        return default_head_learning_rate(mode, lambda: 0.05, rate=1e-3, private=private)

    assert (rate("lora", private=True), rate("lora", private=False)) == (0.05, 1e-3)
    assert rate("full", private=True) == rate("last-layer", private=True) == 1e-3
