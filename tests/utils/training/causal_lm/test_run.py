"""A job that runs: what it trains with, and what it releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_clm
from dptune.run.checkpoint import load_checkpoint
from tests.scripts.test_train_clm import flags
from tests.utils.training.causal_lm.jobs import WITHOUT_PRIVACY, in_float16
from utils.training.causal_lm import run
from utils.training.causal_lm import task as task_module
from utils.training.causal_lm.run import run_job


def test_a_whole_model_trains_in_float16_as_in_float32(
    job: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws and noise: without its gradients a model would be off by more than 0.03 of the change."""
    how = {"trainable": "all", "lora_r": None, "insecure_test_seed": 1, "max_train_steps": 3, "num_train_epochs": None}
    found = []
    for name in ("float32", "float16"):
        if name == "float16":
            in_float16(monkeypatch)
        run_job(job(**how, optimizer="sgd", learning_rate=1.0))
        (tmp_path / "out").rename(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "publish")
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    change = found[0] - torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    assert 0 < (found[1] - found[0]).norm() < 5e-3 * change.norm()


def test_an_early_end_releases_the_best_weights_and_states_the_plans_epsilon(
    job: Any,  # noqa: ARG001  # makes the rows
    tiny_model_dir: Path,
    tmp_path: Path,
    no_plots: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([5.0, 3.0, 4.0])  # at the start and after two steps
    monkeypatch.setattr(task_module, "held_out_loss", lambda *_: next(losses))
    given = {"max_train_steps": 9, "num_train_epochs": None, "eval_freq": 1, "early_stopping_patience": 1}
    given |= {"validation_file": tmp_path / "rows.jsonl", "validation_is_public": True, "load_best_model_at_end": True}
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    report = json.loads((tmp_path / "out" / "publish" / "privacy_report.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (report["steps"], report["unused_steps"]) == (2, 7)
    assert (results["eval_loss"], results["released_step"]) == (3.0, 1)


def test_an_average_is_planned_stated_and_released(
    job: Any,
    tiny_model_dir: Path,
    tmp_path: Path,
    no_plots: None,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"max_train_steps": 4, "num_train_epochs": None, "average_last": 0.5}
    planned = job(**given)
    assert (planned.identity["average_last"], planned.config["average_last"]) == (0.5, 0.5)
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    told = "mean of the weights after steps 3 to 4"
    assert capsys.readouterr().out.count(f"released weights       {told}\n") == 3, "twice in plans, once at the end"
    published = tmp_path / "out" / "publish"
    assert json.loads((published / "privacy_report.json").read_text())["average"] == told
    card = (published / "README.md").read_text()
    assert f"| Released weights | {told} |" in card
    assert "--average_last 0.5" in card
    last = load_checkpoint(tmp_path / "out" / "checkpoint-4")
    released = torch.load(published / "lora_weights.bin", weights_only=True)
    for name, tensor in last.average.items():
        assert torch.equal(released[name], tensor)
        assert not torch.equal(released[name], last.weights[name])


@pytest.mark.parametrize(
    ("how", "expected"),
    [({}, None), (WITHOUT_PRIVACY, 1.0), (WITHOUT_PRIVACY | {"max_grad_norm": 0}, None)],
)
def test_a_run_without_privacy_clips_as_the_trainer_does(
    how: dict[str, Any], expected: float | None, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[Any] = []
    monkeypatch.setattr(run, "train", lambda *given: paces.append(given[4]))
    run_job(job(**how))
    assert paces[0].plain_max_grad_norm == expected
