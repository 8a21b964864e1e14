"""The training loops and the computed example of docs/, run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_llama

DOCS = Path(__file__).resolve().parents[1] / "docs" / "how_to"
LOOP = """
    import torch
    ids = torch.randint(3, 400, (3, 7))
    losses = dptune.CausalLMLoss(model)
    before = model.model.norm.weight.clone()
    for _ in range(2):
        drawn = sampler.draw()
        ids = torch.randint(3, 400, (max(len(drawn), 1), 7))
        step.backward(losses(ids, ids), items=drawn)
        step.finish()
        optimizer.step()
    assert not torch.equal(model.model.norm.weight, before)
dptune.require_exact_gradients(model, losses, ids, ids)
"""


def test_the_loop_runs_as_printed_and_learns(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "loop.md").read_text(), flags=re.DOTALL)
    assert len(block.strip().splitlines()) < 28
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    texts = [torch.randint(3, 400, (4 + index % 9,)) for index in range(64)]
    before = model(texts[0][None]).logits
    exec(block, {"model": model, "texts": texts})
    assert capsys.readouterr().out.startswith("epsilon 8.00 at delta 1e-05")
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 20
    assert not torch.equal(model(texts[0][None]).logits, before)


def test_the_loop_of_the_page_on_whole_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "whole_models.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny_llama(layers=1, hidden=16)}
    exec(block + LOOP, names)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 2


def test_the_selection_of_the_page_on_choosing_keeps_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "choosing.md").read_text(), flags=re.DOTALL)
    exec(block, {})
    (epsilon,) = re.findall(r"selection=([\d.]+)", capsys.readouterr().out)
    assert 7.9 < float(epsilon) <= 8
