"""A training alone in its folder: locked before it writes, configured before it trains, stated before it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dptune import InvalidArgument, Ledger
from dptune.ledger import LEDGER_NAME
from dptune.run.lock import FolderLock
from tests.tasks import STEPS, TinyTask, micro_batches, pace, plan
from tests.utils.training.test_loop import asked_in
from utils.cli.launch import make_accelerator
from utils.cli.settings_file import SETTINGS_NAME, read_settings_file
from utils.training import run as module
from utils.training.loop import End
from utils.training.output_arguments import OutputArguments
from utils.training.outputs import CONFIG_NAME, RESULTS_NAME
from utils.training.run import open_folder, train

pytestmark = pytest.mark.usefixtures("no_plots")

BUSY = "another process is at work in it"
FLAGS = {"learning_rate": 0.01, "seed": None}


def trained(folder: Path, task: TinyTask, **flags: Any) -> End:
    """One launch in `folder`."""
    output = OutputArguments(str(folder), **({"checkpointing_steps": 2} | flags))
    with open_folder(output, make_accelerator()) as opened:
        return train(task, plan(test_seed=None), opened, micro_batches(task), pace(), {"learning_rate": 0.01}, FLAGS)


def require_busy(folder: Path) -> None:
    with FolderLock() as other, pytest.raises(InvalidArgument, match=BUSY):
        other.take(folder)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_is_locked_and_the_settings_written_before_anything_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    seen: list[set[str]] = []

    def look() -> None:
        require_busy(folder)
        seen.append(files(folder))

    assert trained(folder, TinyTask(on_evaluate=look)) == End(STEPS, None)
    assert {CONFIG_NAME, SETTINGS_NAME, ".lock"} <= seen[0]
    assert LEDGER_NAME not in seen[0]
    assert json.loads((folder / CONFIG_NAME).read_text()) == {"learning_rate": 0.01}
    assert read_settings_file(str(folder / SETTINGS_NAME)) == {"learning_rate": "0.01"}
    with FolderLock() as other:
        other.take(folder)  # free again


def test_what_was_trained_is_saved_last_while_the_folder_is_still_held(tmp_path: Path) -> None:
    folder, at_save = tmp_path / "run", list[set[str]]()

    def look(where: Path) -> None:
        assert where.parent == folder
        require_busy(folder)
        at_save.append(files(folder) - {where.name})

    trained(folder, TinyTask(on_save=look))
    assert at_save == [files(folder) - {"publish"}], "nothing is written after it"
    assert {RESULTS_NAME, LEDGER_NAME} <= at_save[0]
    assert json.loads((folder / "publish" / "privacy_report.json").read_text())["steps"] == STEPS


def test_a_model_that_cannot_be_saved_publishes_nothing(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        trained(tmp_path / "run", TinyTask(on_save=fail))
    assert not [name for name in files(tmp_path / "run") if "publish" in name]
    assert Ledger(tmp_path / "run" / LEDGER_NAME).steps == STEPS
    with FolderLock() as other:
        other.take(tmp_path / "run")


def test_the_loser_of_a_race_for_a_new_folder_writes_nothing(tmp_path: Path) -> None:
    folder, task = tmp_path / "run", TinyTask()
    with open_folder(OutputArguments(str(folder)), make_accelerator()) as opened, FolderLock() as winner:
        winner.make(folder)
        with pytest.raises(InvalidArgument, match=BUSY):
            train(task, plan(), opened, micro_batches(task), pace(), {}, FLAGS)
        assert files(folder) == {".lock"}


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_folder_in_use_is_not_opened(resume: str | None, tmp_path: Path) -> None:
    output = OutputArguments(str(tmp_path), resume_from_checkpoint=resume)
    with FolderLock() as other:
        other.take(tmp_path)
        with pytest.raises(InvalidArgument, match=BUSY), open_folder(output, make_accelerator()):
            pass


def test_a_stopped_run_is_neither_stated_nor_saved_and_then_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, task = tmp_path / "run", TinyTask(on_save=lambda _: pytest.fail("it is not finished"))
    with monkeypatch.context() as patch:
        asked_in(patch, 4)
        assert trained(folder, task) == End(3, "SIGTERM")
    assert "SIGTERM: stopped after step 3" in capsys.readouterr().out
    assert not {"publish", RESULTS_NAME} & files(folder)
    with pytest.raises(InvalidArgument, match="holds a run already"):
        trained(folder, task)
    saved: list[Path] = []
    assert trained(folder, TinyTask(on_save=saved.append), resume_from_checkpoint="latest") == End(STEPS, None)
    assert [one.parent for one in saved] == [folder]
    report = json.loads((folder / "publish" / "privacy_report.json").read_text())
    assert (report["steps"], report["repeated_steps"]) == (STEPS, 0)


def test_another_task_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        asked_in(patch, 2)
        trained(tmp_path / "run", TinyTask())
    other = TinyTask(identity={"training_data": "others"})
    with pytest.raises(InvalidArgument, match="training_data was 'those' in the checkpoint and is 'others' now"):
        trained(tmp_path / "run", other, resume_from_checkpoint="latest")
    assert Ledger(tmp_path / "run" / LEDGER_NAME).steps == 1


def test_metrics_of_each_step_go_to_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(module, "start_trackers", lambda _, trackers, *__, **how: begun.append((trackers, how)))
    trained(tmp_path / "run", TinyTask(), report_to="tensorboard")
    ((trackers, how),) = begun
    assert trackers == ["tensorboard"]
    assert how == {"logging_dir": tmp_path / "run" / "tracking"}
