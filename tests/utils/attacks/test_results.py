"""Verdicts: what beats guessing, what contradicts epsilon, and when the rows themselves differ."""

from __future__ import annotations

import numpy as np
import pytest

from utils.attacks.copied import compare_copies
from utils.attacks.exposure import Exposure
from utils.attacks.membership import LOSS, START
from utils.attacks.results import ROWS, Findings, FoundSecret, Membership, percent

TIGHT = ((0.1, 1e-5),)


def membership(shift: float, *, start: float = 0.0) -> Membership:
    """Attacks on 400 training rows whose scores are higher by `shift`, and on 1,000 others."""
    generator = np.random.default_rng(0)
    members = {LOSS: generator.normal(shift, size=400), START: generator.normal(start, size=400)}
    return Membership(ROWS, members, {name: generator.normal(size=1000) for name in members})


def findings(one: Membership, **given: object) -> Findings:
    values: dict[str, object] = {"epsilon": 0.1, "delta": 1e-5, "profile": TIGHT, "unit": "one training example"}
    return Findings(**{**values, "membership": [one], "known": 0, **given})  # type: ignore[arg-type]


def test_guessing_is_called_guessing() -> None:
    found = findings(membership(0.0))
    assert found.contradictions() == []
    assert found.verdict()[0] == "No attack tells training rows from held-out rows better than guessing does."
    assert not any("Careful" in line or "CONTRADICTION" in line for line in found.verdict())


def test_more_than_epsilon_allows_is_a_contradiction() -> None:
    found = findings(membership(3.0))
    (first, *_) = found.contradictions()
    assert first.startswith("loss on rows: at least ")
    assert "epsilon allows at most" in first
    assert any(line.startswith("CONTRADICTION: ") for line in found.verdict())
    assert any("Do not publish this model" in line for line in found.verdict())


@pytest.mark.parametrize("profile", [(), ((8.0, 1e-5),)])
def test_the_same_attack_is_none_where_epsilon_allows_it(profile: tuple[tuple[float, float], ...]) -> None:
    found = findings(membership(3.0), profile=profile)
    assert found.contradictions() == []
    assert found.verdict()[0].startswith("An attacker who wrongly accuses 1% of other rows finds ")


def test_the_control_is_no_attack() -> None:
    found = findings(membership(0.0, start=3.0))
    assert found.contradictions() == []
    assert found.verdict()[1].startswith("Careful: the start model")
    assert START not in found.membership[0].real


def test_epsilon_limits_what_is_allowed() -> None:
    assert findings(membership(0.0)).allowed(0.01) == pytest.approx(0.01 * np.exp(0.1) + 1e-5)
    assert findings(membership(0.0), profile=()).allowed(0.01) is None


def test_secrets_count_if_chance_does_not_explain_them() -> None:
    ranks = (1, 5, 400)
    secrets = [FoundSecret(2, Exposure(rank, 1001), Exposure(500, 1001)) for rank in ranks]
    found = findings(membership(0.0), secrets=secrets)
    assert found.given_away() == 1, "with three secrets, rank 5 of 1001 is not rare enough"
    assert "1 of 3 planted secrets are given away (the most exposed by 10.0 bits)." in found.verdict()


def test_copies_are_named() -> None:
    rows = [f"{word} {word}b {word}c {word}d" for word in "klmnopqrstuv"]
    others = [f"{word} {word}e" for word in "KLMNOPQRSTUV"]
    copied = findings(membership(0.0), copied=compare_copies(rows, rows, others)).verdict()
    assert "Texts of the model share longer passages" in " ".join(copied)
    assert "the model copies (the longest has 4 words)." in " ".join(copied)
    apart = findings(membership(0.0), copied=compare_copies(others, rows, rows)).verdict()
    assert "share no longer passages" in " ".join(apart)


def test_small_shares_keep_their_figures() -> None:
    assert [percent(one) for one in (0, 0.00042, 0.0949, 0.1, 1)] == ["0%", "0.042%", "9.5%", "10%", "100%"]
