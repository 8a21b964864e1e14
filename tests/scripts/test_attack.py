"""scripts/attack.py as a user runs it: a model that learned its rows by heart gives them away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.audit_faults import same_each_launch
from dptune._validate import InvalidArgument
from dptune.report.check import check_publishable
from scripts import attack
from tests.attacked_runs import learned_by_heart, train_run


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    """Plots take longer than all else, and rates at a tenth of all rows need few rows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dptune.report.publish._plot_curve", "utils.training.outputs.plot_diagnostics"):
            patch.setattr(name, lambda path, *_, **__: path.touch() or True)
        patch.setattr("utils.attacks.plots.drawn_image", lambda *_, **__: "data:,")
        for module in ("membership", "report"):
            patch.setattr(f"utils.attacks.{module}.FALSE_ALARMS", (0.1, 0.001))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    learned_by_heart(folder)
    return folder


def attacked(words: list[object], *, status: int = 0) -> dict[str, Any]:
    """The JSON file that an attack wrote."""
    line = [str(word) for word in words]
    if status:
        with pytest.raises(SystemExit) as ended:
            attack.main(line)
        assert ended.value.code == status
    else:
        attack.main(line)
    output = Path(line[line.index("--output_dir") + 1]) if "--output_dir" in line else Path(line[0]) / "attack"
    content: dict[str, Any] = json.loads((output / "attack.json").read_text())
    return content


def test_a_model_without_privacy_gives_its_rows_away(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [folder / "run", "--secrets", folder / "secrets.jsonl", "--candidates", 200, "--num_samples", 8]
    found = attacked(words)
    rows = found["membership"]["rows"]
    assert (rows["members"], rows["others"], found["held_out_rows_left_out"]) == (24, 30, 1)
    for name in ("loss", "loss compared with the start", "least likely tokens"):
        assert rows["attacks"][name]["auc"] > 0.9
        assert rows["attacks"][name]["caught"][0]["low"] > 0.4
        assert rows["attacks"][name]["caught"][1] is None
    assert 0.2 < rows["attacks"]["loss of the start model"]["auc"] < 0.8
    planted, never = found["secrets"]
    assert (planted["rows"], planted["rank"], planted["candidates"]) == (2, 1, 201)
    assert never["rows"] == 0
    assert never["rank"] > 5
    assert found["copied"]["texts"] == 8
    told = capsys.readouterr().out
    assert "privacy                none: the run states no epsilon" in told
    assert "needs 1,000 held out" in told
    assert "1 of 2 planted secrets are given away" in told
    assert "Not private: made from training rows. No epsilon covers it; do not publish it." in told
    assert "Not private: made from training rows" in (folder / "run" / "attack" / "attack.html").read_text()


def test_the_results_cannot_be_published(folder: Path, tmp_path: Path) -> None:
    publish = tmp_path / "publish"
    shutil.copytree(folder / "run" / "publish", publish)
    for name in ("attack.json", "attack.html"):
        (publish / name).write_text("{}")
        with pytest.raises(InvalidArgument, match="is not known to be publishable"):
            check_publishable(publish)
        (publish / name).unlink()


def test_a_private_run_keeps_its_promise_and_a_false_one_is_caught(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of the run without privacy, with the report and ledger of a private one, break what it states."""
    (tmp_path / "base").symlink_to(folder / "base")
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    private = (
        "--clip_norm",
        1,
        "--noise_multiplier",
        30,
        "--delta",
        1e-2,
        "--trainable",
        "all",
        "--learning_rate",
        1e-3,
    )
    with same_each_launch():  # with this key the noise happens to say nothing of the rows; with some it would
        run = train_run(tmp_path, *files, *private, steps=1)
    line = [run, "--output_dir", tmp_path / "results", "--num_samples", 0]
    found = attacked(line)
    assert found["contradictions"] == []
    assert found["copied"] is None
    assert 0.1 < found["allowed"][0]["caught"] < 0.15
    assert found["verdict"][0] == "No attack tells training rows from held-out rows better than guessing does."
    for name in ("model.safetensors", "config.json"):
        shutil.copy(folder / "run" / "publish" / name, run / "publish" / name)
    capsys.readouterr()
    broken = attacked(line, status=1)
    assert len(broken["contradictions"]) == 3
    assert "CONTRADICTION: loss on rows: at least " in capsys.readouterr().out


def test_a_mistake_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            attack.main([str(word) for word in words])
        assert ended.value.code == 2
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return told

    run = folder / "run"
    assert "RUN=" in refused(tmp_path)
    assert "--held_out_file=" in refused(run, "--held_out_file", tmp_path / "none.jsonl")
    assert "--train_file=" in refused(run, "--train_file", tmp_path / "none.jsonl")
    assert "--secrets=" in refused(run, "--secrets", tmp_path / "none.jsonl")
    assert "--samples=" in refused(run, "--samples", tmp_path / "none.jsonl")
    assert "--output_dir=" in refused(run, "--output_dir", run / "publish")
    assert not (run / "publish" / "attack.json").exists()
