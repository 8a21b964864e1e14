"""The last file of a classifier's run: what it holds, whose it is, and what it must not tell."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dptune import InvalidArgument
from tests.dptune.report.test_statement import not_private, private
from utils.classification.outputs import (
    SCORES_NAME,
    describe_scores,
    finished_results,
    last_scores,
    refuse_other_results,
    write_summary,
)
from utils.training.task import Finished

SCORES = {"validation": {"accuracy": 0.8765}}
IDENTITY = {"finetune_mode": "lora", "learning_rate": 0.1, "head_learning_rate": 0.2, "training_data": "a fingerprint"}
DIAGNOSTICS = [{"step": 0, "scores": {"validation": {"accuracy": 0.1}}}, {"step": 2, "scores": SCORES}, {"step": 3}]
VALIDATION: Any = {"validation": SimpleNamespace(labels=np.array([1, 1, 1, 0]))}
TASK: Any = SimpleNamespace(name="sst2", validation=VALIDATION)


def written(folder: Path, *, enable_dp: bool = True) -> dict[str, Any]:
    statement = private() if enable_dp else not_private(noise_multiplier=None, clip_norm=None, delta=None)
    settings: Any = SimpleNamespace(
        mode=SimpleNamespace(finetune_mode="lora"),
        budget=SimpleNamespace(enable_dp=enable_dp),
        steps=SimpleNamespace(seed=7),
    )
    write_summary(Finished(folder, statement, IDENTITY, DIAGNOSTICS, {"seconds": 3.0}), TASK, settings, 130)
    return json.loads((folder / SCORES_NAME).read_text())


def test_a_summary_has_the_last_scores_and_the_statements_figures(tmp_path: Path) -> None:
    found = written(tmp_path)
    assert (found["scores"], found["majority"]) == (SCORES, {"validation": 0.75})
    assert (found["epsilon"], found["steps"], found["clip_norm"], found["private"]) == (2.25712345, 184, 0.75, True)
    assert (found["task"], found["mode"], found["seed"], found["trained_parameters"]) == ("sst2", "lora", 7, 130)
    assert (found["learning_rate"], found["head_learning_rate"], found["seconds"]) == (0.1, 0.2, 3.0)
    assert "not private" in found["notice"]


def test_the_fingerprint_of_the_data_is_not_told(tmp_path: Path) -> None:
    written(tmp_path)
    assert "fingerprint" not in (tmp_path / SCORES_NAME).read_text()
    assert "training_data" not in written(tmp_path)["settings"]


def test_without_privacy_there_is_no_epsilon(tmp_path: Path) -> None:
    found = written(tmp_path, enable_dp=False)
    assert (found["private"], found["epsilon"], found["noise_multiplier"]) == (False, None, None)


def test_results_are_of_the_same_settings_only(tmp_path: Path) -> None:
    assert finished_results(tmp_path) is None
    written(tmp_path)
    results = finished_results(tmp_path)
    assert results is not None
    refuse_other_results(results, IDENTITY)
    refuse_other_results(results, IDENTITY | {"training_data": "another"})  # not known any more
    with pytest.raises(InvalidArgument, match=rf"learning_rate was 0\.1 in {SCORES_NAME} and is 0\.3 now"):
        refuse_other_results(results, IDENTITY | {"learning_rate": 0.3})


def test_scores_are_shown_beside_the_majority() -> None:
    (line,) = describe_scores(TASK, SCORES)
    assert line.startswith("validation             accuracy 0.8765 (")
    assert line.endswith(": 0.7500)")


@pytest.mark.parametrize(("accuracy", "warned"), [(0.75, True), (0.5, True), (0.76, False)])
def test_scores_no_better_than_the_majority_class_are_said(accuracy: float, warned: bool) -> None:
    _, *more = describe_scores(TASK, {"validation": {"accuracy": accuracy}})
    assert len(more) == warned
    told = "on validation it is no better than always giving the majority class (not private)"
    assert all(told in line for line in more)


@pytest.mark.parametrize(("released", "expected"), [(None, 0.9), (1, 0.8), (3, None)])
def test_scores_are_those_of_the_released_weights(tmp_path: Path, released: int | None, expected: float | None) -> None:
    rows = [{"step": 1, "scores": {"v": {"f1": 0.8}}}, {"step": 2, "scores": {"v": {"f1": 0.9}}}, {"step": 3}]
    results = {} if released is None else {"released_step": released}
    found = last_scores(Finished(tmp_path, private(), {}, rows, results))
    assert found == ({} if expected is None else {"v": {"f1": expected}})
