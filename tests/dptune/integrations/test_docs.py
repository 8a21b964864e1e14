"""The code in docs/how_to/trainer.md runs as printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.dptune.integrations.runs import lora_llama
from tests.tiny import tiny_tokenizer

# tests/dptune/integrations/test_sharded_trainer.py runs the second block, of sharded weights.
PAGE = Path(__file__).parents[3] / "docs" / "how_to" / "trainer.md"


def test_both_ways_run_as_printed_and_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own, _, callback = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    model = lora_llama()
    rows = [{"input_ids": torch.randint(3, 400, (4 + number % 9,)).tolist()} for number in range(64)]
    before = model(torch.tensor([[5, 6, 7]])).logits
    names = {"model": model, "tokenizer": tiny_tokenizer(), "train_dataset": rows}
    exec(own, names)
    report = json.loads((tmp_path / "private" / "publish" / "privacy_report.json").read_text())
    assert (report["guarantee"], report["steps"], report["expected_batch_size"]) == ("dp", 4, 32)
    assert 7.5 < report["epsilon"] <= 8.0
    between = model(torch.tensor([[5, 6, 7]])).logits
    assert not torch.equal(before, between)
    exec(callback, names)
    assert json.loads((tmp_path / "callback" / "publish" / "privacy_report.json").read_text())["steps"] == 4
    assert not torch.equal(between, model(torch.tensor([[5, 6, 7]])).logits)
    assert len(re.findall(r"^epsilon \d\.\d\d$", capsys.readouterr().out, flags=re.MULTILINE)) == 2
