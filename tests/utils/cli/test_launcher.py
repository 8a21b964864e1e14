"""How `dptune train` and its like start: the program, the launcher's flags, and what a failure and a signal leave."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dptune._aliases import spellings
from dptune._validate import InvalidArgument
from utils.cli.launch_lines import PLAIN_CONFIG, SHARDED_CONFIG
from utils.cli.launcher import (
    ROOT,
    SWITCHES,
    WITH_VALUE,
    choose,
    groups_of,
    launch,
    launcher_words,
    main,
    split_launcher_flags,
)

SAMPLING = ("inference_generation_instruction", "inference_generation_dataset")
PROGRAMS = ("train_clm", "train_classifier", *SAMPLING)
PLAIN = str(ROOT / PLAIN_CONFIG)


def test_the_launchers_flags_are_taken_out_wherever_they_stand() -> None:
    line = ["--lora_r", "4", "--num-processes=2", "--fsdp_offload_params", "true", "--multi_gpu", "--train_file", "a"]
    options, flags = split_launcher_flags(line)
    assert options == {"num_processes": "2", "fsdp_offload_params": "true", "multi_gpu": None}
    assert flags == ["--lora_r", "4", "--train_file", "a"]


def test_accelerate_has_these_flags_and_no_program_has() -> None:
    from accelerate.commands.launch import launch_command_parser

    actions = {action.dest: action for action in launch_command_parser()._actions}
    assert all(actions[name].nargs is None for name in WITH_VALUE)
    assert all(actions[name].nargs == 0 for name in SWITCHES)
    assert all(action.nargs is None for name, action in actions.items() if name.startswith("fsdp_"))
    for program in PROGRAMS:
        for group in groups_of(program):
            words = [word for name in group.__dataclass_fields__ for word in spellings(name)]
            assert split_launcher_flags(words) == ({}, words)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], SAMPLING[0]),
        (["--help"], SAMPLING[0]),
        (["--instruction_file", "x"], SAMPLING[0]),
        (["--dataset-name=pubmed_generation", "--max_length", "9"], SAMPLING[1]),
        (["--config", "run.yaml"], SAMPLING[1]),
    ],
)
def test_the_flags_choose_the_program(
    line: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("num_samples: 3")
    assert choose(SAMPLING, line) == expected


def test_flags_of_two_programs_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^--instruction_file: belongs to another program than --num_samples"):
        choose(SAMPLING, ["--num_samples", "3", "--instruction_file", "x"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_processes": "1"}, ["--config_file", PLAIN, "--mixed_precision", "no", "--num_processes", "1"]),
        ({"mixed_precision": "bf16"}, ["--config_file", PLAIN, "--mixed_precision", "bf16"]),
        (
            {"num_processes": "2"},
            ["--config_file", PLAIN, "--mixed_precision", "no", "--num_processes", "2", "--multi_gpu"],
        ),
        (
            {"config_file": SHARDED_CONFIG, "num_processes": "2"},
            ["--config_file", str(ROOT / SHARDED_CONFIG), "--num_processes", "2"],
        ),
    ],
)
def test_several_processes_need_no_further_flag(
    options: dict[str, str | None], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the shipped configurations are found from everywhere
    assert launcher_words(options) == words


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_processes": "two"}, "--num_processes='two': give a whole number"),
        ({"config_file": "none.cfg"}, "--config_file='none.cfg': there is no such file; shipped are accelerate_con"),
        ({"config_file": "pyproject.toml"}, "is no launch configuration"),
    ],
)
def test_a_mistake_in_the_launchers_flags_is_refused(options: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        launcher_words(options)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("line", [["--num_processes", "2", "--lora_rr", "4"], ["--lora_rr", "4"]])
def test_a_mistake_is_one_line_before_anything_starts(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.cli.launcher.launch", lambda _: pytest.fail("started"))
    monkeypatch.setattr(sys, "argv", ["dptune"])
    with pytest.raises(SystemExit) as exit_:
        main(["train_clm", "--model_name_or_path", "m", "--output_dir", "o", *line])
    assert exit_.value.code == 2
    assert (
        capsys.readouterr().err == "error: unknown flag: --lora_rr (did you mean --lora_r?) (--help lists the flags)\n"
    )


# One program for both: rank 1 ends as it is told, by its arguments; rank 0 waits for a signal, and tells of it.
PROGRAM = """
import os, signal, sys, time
ending = sys.argv[1]
if int(os.environ.get("RANK", 0)) == 1 and ending.isdecimal():
    sys.exit(int(ending))
def stop(*_):
    os.write(1, b"stopped\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"ready\\n")
time.sleep(60)
"""
LAUNCH = "import sys; from utils.cli.launcher import launch, launcher_words; launch(sys.argv[1:])"


def launched(tmp_path: Path, processes: int, ending: str) -> subprocess.Popen[str]:
    """The program above, started by the launcher."""
    (tmp_path / "program.py").write_text(PROGRAM)
    words = launcher_words({"num_processes": str(processes), "main_process_port": "0"})  # a free port
    command = [sys.executable, "-c", LAUNCH, *words, str(tmp_path / "program.py"), ending]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_failure_is_told_once_and_keeps_its_status(tmp_path: Path) -> None:
    run = launched(tmp_path, 2, "3")
    _, errors = run.communicate(timeout=100)
    assert (run.returncode, errors) == (3, "")


def test_of_a_process_that_a_signal_ended_the_launcher_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch as launcher
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fail(_: object) -> None:
        raise ChildFailedError("program", {1: ProcessFailure(local_rank=1, pid=2, exitcode=-9, error_file="")})

    monkeypatch.setattr(launcher, "launch_command", fail)
    monkeypatch.setattr(launcher, "simple_launcher", None)  # so that it is put back
    monkeypatch.setattr(logging, "disable", lambda _: None)
    with pytest.raises(SystemExit) as exit_:
        launch(["program.py"])
    assert (exit_.value.code, capsys.readouterr().err) == (128 + 9, "error: process 1 was ended by signal 9\n")


@pytest.mark.parametrize(("processes", "status"), [(1, 0), (2, 128 + signal.SIGTERM)])
def test_a_signal_reaches_the_processes(tmp_path: Path, processes: int, status: int) -> None:
    run = launched(tmp_path, processes, "never")
    assert run.stdout is not None
    assert [run.stdout.readline() for _ in range(processes)] == ["ready\n"] * processes
    run.send_signal(signal.SIGTERM)
    out, errors = run.communicate(timeout=100)
    assert (out, errors, run.returncode) == ("stopped\n" * processes, "", status)
