"""scripts/merge.py as a user runs it; a mistake is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dptune.report.check import check_publishable
from scripts import merge
from tests.tiny import CORPUS, save_tiny
from train_clm import main as train
from utils.files.folders import recorded_by_training

pytestmark = pytest.mark.usefixtures("no_plots")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        merge.main(words)
    assert ended.value.code == 2
    *_, told = capsys.readouterr().err.splitlines()
    return told


def test_a_run_is_merged_with_its_guarantee(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, run, target = save_tiny(tmp_path / "base"), tmp_path / "run", tmp_path / "merged"
    rows = tmp_path / "rows.csv"
    rows.write_text("\n".join(["instruction,answer", *(f'"{text}","{text}"' for text in CORPUS * 4)]))
    words = ["--model_name_or_path", base, "--train_file", rows, "--output_dir", run, "--block_size", 32]
    words += ["--per_device_train_batch_size", 10, "--gradient_accumulation_steps", 1, "--max_train_steps", 2]
    words += ["--noise_multiplier", 1, "--delta", 1e-3, "--learning_rate", 1e-1, "--lora_r", 2]
    train([str(word) for word in [*words, "--base_model_name", "ann/base"]])
    capsys.readouterr()
    line = [str(run), "--output_dir", str(target)]
    assert refused(line, capsys).startswith("error: --model_name_or_path='ann/base': no model could be loaded")
    assert not target.exists()
    merge.main([*line, "--model_name_or_path", str(base)])
    told = capsys.readouterr().out
    assert f"base model             {base} in float32" in told
    assert "privacy                epsilon " in told
    assert "at delta 0.001, as before" in told
    assert check_publishable(target) == check_publishable(run / "publish")
    assert next(recorded_by_training(target, "block_size")) == 32, "what sampling must know goes along"
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(one)(ids).logits for one in (base, target))
    assert (before - after).abs().max() > 1e-3
    assert "is there already; give another name" in refused(line, capsys)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base")
    target = str(tmp_path / "merged")
    assert f"ADAPTER='{base}': holds a whole model" in refused([str(base), "--output_dir", target], capsys)
    assert "ADAPTER=" in (told := refused([str(tmp_path), "--output_dir", target], capsys))
    assert "no adapter there" in told
    deep = str(tmp_path / "no" / "merged")
    assert f"--output_dir='{deep}': the folder that it lies in does not exist" in refused(
        [str(base), "--output_dir", deep], capsys
    )
    assert "--dtype" in refused([str(base), "--output_dir", target, "--dtype", "int8"], capsys)
