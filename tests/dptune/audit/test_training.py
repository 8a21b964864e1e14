"""Canaries are kept and read whole, and guesses that beat the accounting contradict it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dptune import InvalidArgument, accounting
from dptune.accounting import Spend
from dptune.audit.training import Canaries, audit_training, canaries_in, guesses_of, read_canaries, write_canaries

SPENDS, DELTA = [Spend(2.0, 0.1, 50)], 1e-6


def canaries_with(signal: float, count: int = 400, seed: int = 0) -> Canaries:
    generator = np.random.default_rng(seed)
    included = generator.integers(0, 2, count).astype(bool)
    return Canaries(included, {"loss": signal * included + generator.normal(size=count)})


@pytest.mark.parametrize("seed", range(3))
def test_a_blind_adversary_contradicts_nothing(seed: int) -> None:
    findings = audit_training([canaries_with(0.0, seed=seed)], SPENDS, delta=DELTA)
    assert [one.contradicted for one in findings] == [False] * 3
    assert findings[0].stated == accounting.compose(SPENDS, delta=DELTA)
    assert findings[0].observations == 400


def test_an_adversary_who_sees_too_much_contradicts_the_accounting() -> None:
    plain, by_mu, by_curve = audit_training([canaries_with(8.0)], SPENDS, delta=DELTA)
    assert plain.contradicted
    assert plain.found > plain.stated
    assert by_mu.found > plain.stated
    assert by_curve.contradicted
    assert by_curve.found < by_curve.stated


def test_scores_that_the_accounting_allows_do_not() -> None:
    """mu of the subsampled steps together is about q sqrt(steps (e^(1/sigma^2) - 1)) = 0.38."""
    for seed in range(3):
        findings = audit_training([canaries_with(0.38, seed=seed)], SPENDS, delta=DELTA)
        assert not [one for one in findings if one.contradicted]


def test_two_sets_of_canaries_share_the_chance_of_a_false_finding() -> None:
    few, many = canaries_with(2.0, count=60), canaries_with(3.0, count=80, seed=1)
    named = Canaries(many.included, {"gradients": many.scores["loss"]})
    both = audit_training([few, named], SPENDS, delta=DELTA)
    assert [one.observations for one in both] == [60] * 3 + [80] * 3
    assert "gradients" in both[3].question
    for own, together in ((few, both[:3]), (named, both[3:])):
        half = audit_training([own], SPENDS, delta=DELTA, confidence=0.975)
        assert half[0].found > 0
        assert [one.found for one in together] == pytest.approx([one.found for one in half])
        assert together[2].stated == pytest.approx(half[2].stated)
    with pytest.raises(InvalidArgument, match="scores=0: the training has not ended"):
        audit_training([few, Canaries(many.included, {})], SPENDS, delta=DELTA)


def test_all_canaries_of_a_folder_are_found(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"canaries\.json': cannot be read .*; train with canaries first"):
        canaries_in(tmp_path)
    for name, count in (("dials.json", 30), ("canaries.json", 20)):
        write_canaries(tmp_path / "audit" / name, canaries_with(1.0, count=count))
        assert [len(one.included) for one in canaries_in(tmp_path)] == ([30] if name == "dials.json" else [20, 30])


def test_the_numbers_of_guesses_are_even_and_do_not_see_the_coins() -> None:
    assert guesses_of(400) == [400, 200, 100, 50]
    assert guesses_of(17) == [16, 8, 4, 2]


def test_canaries_are_written_and_read(tmp_path: Path) -> None:
    canaries = canaries_with(1.0, count=20)
    path = tmp_path / "audit" / "canaries.json"
    write_canaries(path, canaries)
    found = read_canaries(path)
    assert (found.included == canaries.included).all()
    assert (found.scores["loss"] == canaries.scores["loss"]).all()
    assert json.loads(path.read_text())["note"].startswith("NOT PRIVATE")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no file of canaries"),
        ("[]", "is no file of canaries"),
        ('{"format": 1, "included": [true]}', "is no file of canaries"),
        ('{"format": 2, "included": [], "scores": {}}', "is of another version of dptune"),
        ('{"format": 1, "included": [true], "scores": {}}', "included=1: give at least 16 canaries"),
    ],
)
def test_other_files_are_refused(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "canaries.json"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=told):
        read_canaries(path)


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot be read .*; train with canaries first"):
        read_canaries(tmp_path / "nothing.json")
    included = np.zeros(20, dtype=bool)
    with pytest.raises(InvalidArgument, match="scores=0: the training has not ended"):
        audit_training([Canaries(included, {})], SPENDS, delta=DELTA)
    with pytest.raises(InvalidArgument, match=r"confidence=0\.2: give a number"):
        audit_training([canaries_with(1.0)], SPENDS, delta=DELTA, confidence=0.2)
    for wrong in (np.zeros(3), np.full(20, np.nan)):
        with pytest.raises(InvalidArgument, match="scores='loss': give a finite number for each of the 20"):
            Canaries(included, {"loss": wrong})
