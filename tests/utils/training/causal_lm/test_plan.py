"""A language model's job: planned before its model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import train_clm
from dptune import InvalidArgument
from dptune.run.identity import num_trained
from tests.scripts.test_train_clm import flags
from tests.utils.data.test_template_date import TELLING, set_clock
from tests.utils.training.causal_lm.jobs import WITHOUT_PRIVACY
from utils.cli.flags import parse
from utils.cli.launch import make_accelerator
from utils.training import privacy_flags
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups
from utils.training.causal_lm.skeleton import prepared_skeleton
from utils.training.micro_batches import remember_budget
from utils.training.target import target_of


def test_a_job_is_planned_from_its_flags_and_writes_nothing(job: Any, tmp_path: Path) -> None:
    planned = job(num_train_epochs=2)
    assert (planned.plan.num_examples, planned.plan.expected_batch_size, planned.plan.steps) == (40, 16, 5)
    assert (planned.asked, planned.token_budget, planned.config["num_processes"]) == (4 * 48, 4 * 48, 1)
    assert planned.identity == {"training_data": planned.train.fingerprint(), "optimizer": "adamw"}
    assert not (tmp_path / "out").exists()


def test_automatic_noise_bands_have_room_for_what_is_trained(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"noise_multiplier": None, "target_epsilon": 8, "gradient_accumulation_steps": 1, "max_train_steps": 8}
    free = job(**given)
    assert free.plan.noise_bands > 1
    assert free.identity["optimizer"] == "lowpass-adam"
    asked: list[int] = []
    monkeypatch.setattr(privacy_flags, "bands_within", lambda values: asked.append(values) or 1)
    full = job(**given)
    assert full.plan.noise_bands == 1
    assert full.identity["optimizer"] == "adamw"
    assert num_trained(prepared_skeleton(full.groups, target_of(full.groups.planning, make_accelerator()))[0]) in asked


def test_a_resumed_job_has_the_date_and_so_the_data_that_it_began_with(
    job: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "telling")
    (model / "chat_template.jinja").write_text(TELLING)
    given = {"model_name_or_path": model, "prompt_style": "chat", "max_train_steps": 2, "checkpointing_steps": 1}
    set_clock(monkeypatch, "2026-01-31T23:00:00")
    began = job(**given)
    assert began.identity["template_date"] == "2026-01-31"
    assert "31 Jan" in began.tokenizer.decode(began.train.ids)
    train_clm.main(flags(model, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    set_clock(monkeypatch, "2026-02-01T01:00:00")
    resumed = job(**given, resume_from_checkpoint="latest")
    assert resumed.identity == began.identity
    assert json.loads((tmp_path / "out" / "run_config.json").read_text())["template_date"] == "2026-01-31"


def test_files_are_recorded_as_in_the_command_line(job: Any, tmp_path: Path) -> None:
    """One file as text, as older runs recorded it, which are compared when they resume."""
    assert job().config["train_file"] == str(tmp_path / "rows.jsonl")
    (tmp_path / "shards").mkdir()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "shards" / "1.jsonl")
    planned = job(train_file=tmp_path / "shards", validation_file=tmp_path / "*.jsonl")
    assert planned.config["train_file"] == str(tmp_path / "shards")
    assert planned.config["validation_file"] == str(tmp_path / "*.jsonl")
    assert len(planned.train) == len(planned.held_out) == 40


def test_a_budget_that_did_not_fit_is_remembered(job: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    remember_budget(tmp_path / "out", asked=192, fits=64)
    assert (job().asked, job().token_budget) == (192, 64)
    assert job(max_tokens_per_device=100).token_budget == 100


def test_what_the_adapter_decides_is_not_given_too(tmp_path: Path, tiny_model_dir: Path) -> None:
    given = flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", initial_adapter="somewhere")
    groups = Groups(*parse(*CAUSAL_LM_GROUPS, args=given))
    with pytest.raises(InvalidArgument, match=r"^--lora_r=4: comes from --initial_adapter; leave it out"):
        groups.refuse_unread({"lora_r", "initial_adapter"})


# --- held-out rows that decide ---


def test_held_out_rows_decide_only_if_they_are_declared_public(job: Any, tmp_path: Path) -> None:
    held_out = {"validation_file": tmp_path / "rows.jsonl", "early_stopping_patience": 1}
    with pytest.raises(InvalidArgument, match=r"^--early_stopping_patience=1: the result would depend on the held-out"):
        job(**held_out)
    with pytest.raises(InvalidArgument, match="there are no held-out rows"):
        job(early_stopping_patience=1, validation_is_public=True)
    assert job(**held_out, validation_is_public=True).groups.output.selection.patience == 1
    assert job(**held_out, **WITHOUT_PRIVACY).groups.output.selection.patience == 1


def test_another_average_is_not_resumed(job: Any, tiny_model_dir: Path, tmp_path: Path, no_plots: None) -> None:  # noqa: ARG001
    given = {"max_train_steps": 1, "num_train_epochs": None, "ema": 0.9}
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    with pytest.raises(InvalidArgument, match=r"ema was 0\.9 in the checkpoint and is 0\.8 now"):
        job(**given | {"ema": 0.8, "resume_from_checkpoint": "latest"})
    with pytest.raises(InvalidArgument, match=r"ema was 0\.9 in the checkpoint and is None now"):
        job(**given | {"ema": None, "resume_from_checkpoint": "latest"})
