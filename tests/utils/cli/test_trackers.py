"""Trackers: chosen and refused by name, announced as not private, and never given a token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator, tracking

from dptune._validate import InvalidArgument
from utils.cli import trackers
from utils.cli.trackers import choose_trackers, public_settings, start_trackers
from utils.training.output_arguments import OutputArguments

TOKEN = "hf_TopSecretToken"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trackers that accelerate finds; a test changes the list."""
    names = ["wandb", "tensorboard"]
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: names)
    return names


@pytest.mark.parametrize("report_to", [None, "none"])
def test_nothing_is_tracked_unless_it_is_asked_for(
    report_to: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, choose_trackers(report_to), "project", {}, logging_dir=tmp_path / "logs")
    assert accelerator.trackers == []
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_all_means_the_installed_ones_that_we_name(installed: list[str]) -> None:
    installed.extend(["mlflow", "aim"])
    assert choose_trackers("all") == ["wandb", "tensorboard", "mlflow"]
    assert choose_trackers("mlflow") == ["mlflow"]
    assert choose_trackers("tensorboard") == ["tensorboard"]


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        (None, ["tensorboard"]),
        ("none", ["tensorboard"]),
        ("tensorboard", ["tensorboard"]),
        ("wandb", ["tensorboard", "wandb"]),
        ("all", ["tensorboard", "wandb"]),
    ],
)
@pytest.mark.usefixtures("installed")
def test_with_tracking_writes_local_files_and_report_to_adds_to_them(
    report_to: str | None, expected: list[str]
) -> None:
    assert choose_trackers(report_to, with_tracking=True) == expected
    assert OutputArguments("out", with_tracking=True, report_to=report_to).trackers == expected


def test_with_tracking_names_the_package_that_it_needs(installed: list[str]) -> None:
    installed.remove("tensorboard")
    with pytest.raises(InvalidArgument, match=r"--with_tracking=True: .*pip install tensorboard"):
        OutputArguments("out", with_tracking=True)


@pytest.mark.parametrize(
    ("report_to", "present", "remedy"),
    [
        ("trackio", ["wandb"], "pip install trackio"),
        ("wandb", [], "pip install wandb"),
        ("all", ["aim"], "pip install wandb"),
        ("mlflow", ["wandb"], "pip install mlflow"),
        ("aim", ["aim"], "wandb, tensorboard, trackio, mlflow, all, none"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(
    installed: list[str], report_to: str, present: list[str], remedy: str
) -> None:
    installed[:] = present
    with pytest.raises(InvalidArgument) as error:
        choose_trackers(report_to)
    message = str(error.value)
    assert message.startswith(f"--report_to={report_to!r}: ")
    assert remedy in message
    assert "\n" not in message


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(accelerator, "init_trackers", fail)
    with pytest.raises(InvalidArgument, match=r"trackers='tensorboard'.*api_key not configured \(no-tty\)"):
        start_trackers(accelerator, ["tensorboard"], "project", {}, logging_dir=tmp_path)


def test_tensorboard_gets_the_steps_and_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    accelerator = Accelerator(cpu=True)
    config = {"access_token": TOKEN, "lr": 3e-4, "modules": ["q", "k"], "none": None, "line": f"--access_token {TOKEN}"}
    start_trackers(
        accelerator, choose_trackers(None, with_tracking=True), "project", config, logging_dir=tmp_path / "logs"
    )
    accelerator.log({"loss": 2.5, "epsilon": 0.5}, step=1)
    accelerator.log({"loss": 2.0}, step=2)
    accelerator.end_training()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "NOT private" in said
    assert f"stay in {tmp_path / 'logs'}" in said
    events = EventAccumulator(str(tmp_path / "logs" / "project"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.0)]
    assert _files_with(tmp_path, "3e-4") or _files_with(tmp_path, "0.0003"), "the settings are there"
    assert _files_with(tmp_path, TOKEN) == []


def test_wandb_gets_no_token_not_even_from_the_command_line(tmp_path: Path) -> None:
    """By default wandb stores `sys.argv` in a run's metadata; the run is made offline and searched."""
    pytest.importorskip("wandb", reason="wandb comes with requirements.txt, not with `pip install dptune`")
    code = (
        "import sys; from accelerate import Accelerator; from utils.cli.trackers import start_trackers\n"
        "a = Accelerator(cpu=True)\n"
        "config = {'access_token': sys.argv[2], 'marker': 'a-setting-to-find'}\n"
        "start_trackers(a, ['wandb'], 'project', config, logging_dir=sys.argv[1])\n"
        "a.log({'loss': 2.5}, step=1); print('printed', sys.argv[2]); a.end_training()"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "HF_TOKEN": TOKEN, "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", code, str(tmp_path / "logs"), TOKEN]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert _files_with(tmp_path, "a-setting-to-find"), "the run is in the folder it was given"
    assert _files_with(tmp_path, TOKEN) == []


def test_settings_are_flat_scalars_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    config = {
        "model": {"access_token": TOKEN, "name": f"https://user:{TOKEN}@hub/x"},
        "max_tokens_per_device": 2048,
        "note": "hf_from_the_environment",
        "modules": ["q_proj", "k_proj"],
        "gradient_ckpt": True,
        "delta": None,
        "WANDB_API_KEY": "an-api-key",
    }
    assert public_settings(config) == {
        "model.name": "https://user:***@hub/x",
        "max_tokens_per_device": 2048,
        "note": "***",
        "modules": "['q_proj', 'k_proj']",
        "gradient_ckpt": True,
        "delta": None,
    }


def test_each_tracker_is_kept_from_collecting_more(tmp_path: Path) -> None:
    kwargs = trackers._init_kwargs(["wandb", "tensorboard", "trackio"], tmp_path)
    settings = SimpleNamespace(**kwargs["wandb"]["settings"])
    assert (settings.x_disable_meta, settings.console) == (True, "off")
    assert kwargs["trackio"] == {"private": True}


def _files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
