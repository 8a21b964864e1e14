"""Real launches that are killed: what they leave is gone on with, and nothing is lost or counted too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.faults import Launch, run_with_kills, write_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "data.json")


def test_three_kills_lose_nothing_and_change_nothing(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """With repeatable randomness the killed and resumed run ends with the weights of one that nobody killed."""
    fixed = ("--insecure_test_seed", "7")
    calm = run_with_kills(Launch(tiny_model_dir, data, tmp_path / "calm", 14, extra=fixed), 0, seed=0)
    killed = run_with_kills(Launch(tiny_model_dir, data, tmp_path / "killed", 14, extra=fixed), 3, seed=4)
    assert len(killed.kills) == 3
    assert calm.ledger_lines == 14
    assert killed.ledger_lines >= killed.applied > 14, "no kill fell between two checkpoints: another seed is needed"
    ours, theirs = (torch.load(tmp_path / name / "lora_weights.bin", weights_only=True) for name in ("killed", "calm"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)
