"""The page of the comparison of modes has the table, the plot and the settings, and no path of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.mode_comparison import ComparisonArguments, main
from dptune import InvalidArgument
from scripts import compare_modes
from tests.trainer_stand_in import Trainer


def test_the_page_has_what_the_comparison_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(tmp_path / "private" / "MiniLM-L6")
    flags = ["--modes", "full", "lora", "--learning_rates", "1e-3", "--batch_size", "100", "--num_train_epochs", "2"]
    flags += [
        "--model_name_or_path",
        model,
        "--data_dir",
        str(tmp_path / "glue"),
        "--target_epsilon",
        "3",
        "--delta",
        "1e-6",
    ]
    trainer = Trainer(lambda ran: 0.7 if ran.clip_norm else 0.8)
    compare_modes.main([*flags, "--output_dir", str(tmp_path / "out"), "--", "--lora_r", "4"], runner=trainer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mode_comparison.py", "--comparison", "out", "--output", "results/name.md"])
    main(ComparisonArguments(comparison="out", output="results/name.md"))
    page = Path("results/name.md").read_text()
    for row in (line for line in Path("out/comparison.md").read_text().splitlines() if line.startswith("| ")):
        assert row in page
    assert "MiniLM-L6, 2 epoch with batches of 100 on average" in page
    assert "epsilon 3 at delta 1e-06, `--lora_r 4`" in page
    assert "error of an accuracy of 0.8 on 872 rows is 0.014" in page
    assert "- hardware: " in page
    assert "(name.png)" in page
    assert os.sep + "private" not in page
    assert Path("results/name.png").read_bytes() == Path("out/comparison.png").read_bytes()


def test_the_result_is_a_markdown_file() -> None:
    with pytest.raises(InvalidArgument, match=r"--output='x.txt': give a file that ends in .md"):
        ComparisonArguments(comparison="out", output="x.txt")
