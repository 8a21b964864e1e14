"""The README's training loop, run as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.tiny import tiny_llama

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_loop_runs_as_printed_and_learns(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(block.strip().splitlines()) < 25
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    texts = [torch.randint(3, 400, (4 + index % 9,)) for index in range(64)]
    before = model(texts[0][None]).logits
    exec(block, {"model": model, "texts": texts})
    assert capsys.readouterr().out.startswith("epsilon 8.00 at delta 1e-05")
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 20
    assert not torch.equal(model(texts[0][None]).logits, before)
