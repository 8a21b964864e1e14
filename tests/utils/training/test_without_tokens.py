"""Dry runs of a configuration alone, or without data: privacy and memory as with them, and what is left out is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import train_clm
from tests.scripts.test_train_clm import flags
from utils.training import privacy_flags, target

CONFIG_ONLY = "tokens                 not counted: there is no tokenizer. Left out: "
NO_DATA = "tokens                 not counted: there are no data. Left out: "
OF_TOKENS = ("tokens  ", "held out  ", "                       no validation")
WITHOUT_DATA: dict[str, Any] = {"train_file": None, "num_examples": 40}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {n}.", "answer": "yes", "who": f"author {n % 20}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder with the tiny model's configuration and nothing else."""
    (folder := tmp_path / "config").mkdir()
    shutil.copy(tiny_model_dir / "config.json", folder)
    return folder


@pytest.fixture
def dry(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Prints the plan of a model with flags changed; returns its lines, or the error."""

    def run(model: Path, **changes: object) -> list[str]:
        line = flags(model, data, tmp_path / "out", **{"dry_run": True, "noise_multiplier": 4, **changes})
        try:
            train_clm.main(line)
        except SystemExit:
            return [capsys.readouterr().err]
        assert not (tmp_path / "out").exists()
        return [one for one in capsys.readouterr().out.splitlines() if one.strip()]

    return run


def test_the_plan_of_a_configuration_is_that_of_the_model_without_tokens(
    dry: Any, tiny_model_dir: Path, config_dir: Path
) -> None:
    whole = [line for line in dry(tiny_model_dir) if not line.startswith(OF_TOKENS)]
    assert any(line.startswith("how much data") for line in whole)
    for name in (config_dir, config_dir / "config.json"):
        lines = dry(name)
        (told,) = [line for line in lines if line.startswith(CONFIG_ONLY)]
        assert "rows cut to --block_size, rows without an answer, held-out rows" in told
        assert [line for line in lines if line != told] == whole


def test_what_is_left_open_is_chosen_as_in_a_run(dry: Any, tiny_model_dir: Path, config_dir: Path) -> None:
    given = {"trainable": "all", "learning_rate": None, "noise_multiplier": None, "target_epsilon": 1, "noise_bands": 2}
    whole, lines = (
        [line for line in dry(folder, **given) if line.startswith(("optimizer  ", "learning rate  "))]
        for folder in (tiny_model_dir, config_dir)
    )
    assert lines == whole
    optimizer, rate = whole
    assert "lowpass-adam (default with noise bands)" in optimizer
    assert float(rate.split()[2]) < 6e-3, "less than the rate of quiet runs"


def test_without_data_the_number_of_rows_is_given(dry: Any, tiny_model_dir: Path, config_dir: Path) -> None:
    by_rows = [line for line in dry(config_dir) if not line.startswith("tokens")]
    for name in (tiny_model_dir, config_dir):
        lines = dry(name, **WITHOUT_DATA)
        assert [line for line in lines if not line.startswith("tokens")] == by_rows
        assert any(line.startswith(NO_DATA) for line in lines)


@pytest.mark.parametrize(("method", "told"), [("user-level", "authors                20"), ("example-level", " 40")])
def test_authors_are_counted_too(method: str, told: str, dry: Any, config_dir: Path) -> None:
    lines = dry(config_dir, privacy_unit="who", examples_per_unit=2, user_level_method=method)
    assert lines[0].endswith(told)


def test_a_named_device_is_planned_for_on_every_machine(
    dry: Any, config_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "precision_of_launch", lambda: "bf16")
    text = "\n".join(dry(config_dir, for_device="T4", for_devices=2))
    assert "expected batch size    32\n" in text, "the batch of two processes"
    assert "planned for            2 x T4 16GB (15.00 GiB), each with all weights" in text
    assert "T4 16GB has no bfloat16: launch with --mixed_precision fp16" in text
    assert "fits: the device has 15.00 GiB" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_run": None}, "config': is a configuration, enough for --dry_run alone; give a folder with a model"),
        ({"train_file": None}, "--train_file=None: give data, or --num_examples for a plan without data"),
        ({"num_examples": 40}, "--num_examples=40: the data say how many there are"),
        ({"dry_run": None, **WITHOUT_DATA}, "--num_examples=40: is read only with --dry_run"),
        ({"resume_from_checkpoint": "latest"}, "--resume_from_checkpoint='latest': there is no tokenizer to compare"),
        ({"train_file": None, "num_examples": 10}, "a batch of 16, more than the 10 examples there are"),
        ({"text_column": "story"}, "--text_column='story'"),
        ({"train_file_weights": "2"}, "--train_file_weights='2': there is no tokenizer, so rows are counted alike"),
        ({"block_size": 1000}, "--block_size=1000: the model's context is 256 tokens"),
        ({"lora_target_modules": "nothing"}, "--lora_target_modules"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str, dry: Any, config_dir: Path) -> None:
    (error,) = dry(config_dir, **changes)
    assert message in error
    assert error.count("\n") == 1


def test_automatic_noise_bands_are_planned_with_the_room_that_a_run_has(
    dry: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**WITHOUT_DATA, "noise_multiplier": None, "target_epsilon": 8, "max_train_steps": 8}
    given |= {"gradient_accumulation_steps": 1}
    assert any(line.startswith("noise bands ") for line in dry(tiny_model_dir, **given))
    asked: list[int] = []
    monkeypatch.setattr(privacy_flags, "bands_within", lambda values: asked.append(values) or 1)
    lines = dry(tiny_model_dir, **given)
    assert not any(line.startswith("noise bands ") for line in lines)
    (trained,) = (line.split()[2] for line in lines if line.startswith("trainable parameters"))
    assert int(trained.replace(",", "")) in asked
