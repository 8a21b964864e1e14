"""Real launches that are killed: what they leave is gone on with, and nothing is lost or counted too little."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import Launch, require_same_bits, run_with_kills, write_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "data.json")


def test_three_kills_lose_nothing_and_change_nothing(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """With repeatable randomness the killed and resumed run ends with the weights of one that nobody killed."""
    fixed = ("--insecure_test_seed", "7")
    launches = [Launch(tiny_model_dir, data, tmp_path / name, 14, extra=fixed) for name in ("calm", "killed")]
    calm, killed = (run_with_kills(launch, kills, seed=4) for launch, kills in zip(launches, (0, 3), strict=True))
    assert len(killed.kills) == 3
    assert calm.ledger_lines == 14
    assert killed.ledger_lines >= killed.applied > 14, "no kill fell between two checkpoints: another seed is needed"
    require_same_bits(*launches)
