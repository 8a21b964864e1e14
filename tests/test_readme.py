"""The training loops and the computed example of docs/, run as they are printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_llama
from utils.cli.launch_lines import as_command

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "how_to"
LLAMA_2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
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


def test_the_plan_of_the_page_on_training_is_printed_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """The configuration is Llama 2 7B's. Line breaks make no difference."""
    section = (DOCS / "training.md").read_text().partition("### Before you have the GPU")[2]
    command, expected, *_ = re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)
    (config := tmp_path / "llama-2-7b" / "config.json").parent.mkdir()
    config.write_text(json.dumps(LLAMA_2_7B))
    words = shlex.split(command.replace("\\\n", " ").replace("llama-2-7b/config.json", str(config)))
    assert words[:2] == ["accelerate", "launch"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = as_command(words[2:])
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected.split()


def test_the_selection_of_the_page_on_choosing_keeps_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "choosing.md").read_text(), flags=re.DOTALL)
    exec(block, {})
    (epsilon,) = re.findall(r"selection=([\d.]+)", capsys.readouterr().out)
    assert 7.9 < float(epsilon) <= 8
