"""What an epsilon means in words; `tests/dptune/report/test_card.py` holds the same words in a card."""

from __future__ import annotations

import math

import pytest

from dptune.accounting.meaning import factor, log_odds, verdict


@pytest.mark.parametrize(("epsilon", "word"), [(0.0, "strong"), (1, "strong"), (1.01, "reasonable"), (10.01, "weak")])
def test_an_epsilon_has_a_name(epsilon: float, word: str) -> None:
    assert verdict(epsilon) == word


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 8.0])
@pytest.mark.parametrize("delta", [1e-7, 0.1])
def test_the_odds_are_those_of_the_best_test(epsilon: float, delta: float) -> None:
    right = (math.exp(epsilon) + delta) / (1 + math.exp(epsilon))
    assert math.exp(log_odds(epsilon, delta)) == pytest.approx(right / (1 - right))


def test_a_factor_is_rounded_up_and_a_power_where_it_is_huge() -> None:
    assert [factor(epsilon) for epsilon in (0.0, 1.0, 8.0, 20.5)] == ["1.00", "2.72", "2990", "e^20.5"]
