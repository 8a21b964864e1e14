"""A register refuses a run that would overspend, whichever program starts it, before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import train_classifier
import train_clm
from dptune.budget import Budget
from dptune.ledger import LEDGER_NAME, Ledger
from tests.classifier_folders import save_bert, write_sst2
from tests.dptune.integrations.runs import dp_trainer, plain_trainer, privacy_arguments

DELTA = 1e-4


@pytest.fixture
def register(tmp_path: Path) -> Budget:
    budget = Budget(tmp_path / "people.jsonl")
    budget.set_limit(0.01, DELTA)
    return budget


def spent_nothing(register: Budget, run: Path) -> bool:
    """Whether no stage is entered and no step is recorded."""
    return register.stages == [] and Ledger(run / LEDGER_NAME).steps == 0


def clm(model: Path, folder: Path, register: Budget, *more: str) -> list[str]:
    rows = folder / "rows.json"
    rows.write_text(json.dumps([{"text": f"one short row {number}"} for number in range(64)]))
    small = "--block_size 16 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_train_steps 2"
    return [
        *("--model_name_or_path", str(model), "--train_file", str(rows), "--output_dir", str(folder / "run")),
        *f"{small} --noise_multiplier 1 --delta 1e-4 --lora_r 2 --num_train_epochs 1".split(),
        *("--register", str(register.path), *more),
    ]


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
def test_train_clm(more: tuple[str, ...], tiny_model_dir: Path, tmp_path: Path, register: Budget, capsys: Any) -> None:
    given = clm(tiny_model_dir, tmp_path, register, *more)
    with pytest.raises(SystemExit) as stopped:
        train_clm.main(given)
    assert stopped.value.code == 2
    assert "--register=" in capsys.readouterr().err
    assert spent_nothing(register, tmp_path / "run")


def test_train_clm_within_the_limit_reserves_its_steps(tiny_model_dir: Path, tmp_path: Path, register: Budget) -> None:
    register.set_limit(50.0, DELTA)
    train_clm.main(clm(tiny_model_dir, tmp_path, register))
    (entry,) = register.stages
    assert (entry.stage, Ledger(tmp_path / "run" / LEDGER_NAME).steps) == ("run", 2)
    assert [spend.steps for spend in entry.reserved] == [2]


def test_train_classifier(tmp_path: Path, register: Budget, capsys: Any) -> None:
    save_bert(tmp_path / "bert")
    write_sst2(tmp_path / "data")
    with pytest.raises(SystemExit):
        train_classifier.main(
            [
                *("--model_name_or_path", str(tmp_path / "bert"), "--datasets", "sst2"),
                *("--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")),
                *[
                    "--block_size",
                    "16",
                    "--batch_size",
                    "24",
                    "--enable_dp",
                    "--noise_multiplier",
                    "1",
                    "--clip_norm",
                    "0.1",
                ],
                *("--delta", "1e-3", "--register", str(register.path)),
            ]
        )
    assert "--register=" in capsys.readouterr().err
    assert spent_nothing(register, tmp_path / "run" / "sst2")


@pytest.mark.parametrize("make", [dp_trainer, plain_trainer])
def test_both_trainers(make: Any, tmp_path: Path, register: Budget) -> None:
    made = make(tmp_path / "run", privacy=privacy_arguments(register=str(register.path)), max_steps=2)
    trainer = made[0] if isinstance(made, tuple) else made
    with pytest.raises(ValueError, match="--register="):
        trainer.train()
    assert spent_nothing(register, tmp_path / "run")
