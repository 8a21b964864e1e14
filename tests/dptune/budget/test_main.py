"""`python -m dptune.budget`: what it prints, and how a register is made and edited."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune.accounting import Spend
from dptune.budget import Budget
from dptune.budget.__main__ import main
from dptune.ledger import begin_ledger

UNIT = "one author"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "people.jsonl")


def test_a_register_is_made_filled_and_closed(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([path, "--limit", "8", "--delta", "1e-6"])
    assert capsys.readouterr().out.split() == ["together", "epsilon", "0.0000", "of", "8", "at", "delta", "1e-06"]
    ledger = Path(path).parent / "outputs" / "run" / "ledger.jsonl"
    Budget(path).reserve(ledger, [Spend(1.0, 0.01, 300)], unit=UNIT, resumes=False)
    begin_ledger(ledger)
    main([path, "--add", "survey 2025", "1.5", "1e-7"])
    run, survey, together, unit = capsys.readouterr().out.splitlines()
    assert run.startswith("outputs/run ")
    assert " reserved, 0 of 300 steps taken (" in run
    assert " epsilon 1.5000 at delta 1e-07, as stated (" in survey
    assert together.endswith(" of 8 at delta 1e-06")
    assert unit == f"for {UNIT}"
    main([path, "--close", "outputs/run"])
    assert "epsilon 0.0000, closed after 0 steps (" in capsys.readouterr().out.splitlines()[1]
    with pytest.raises(SystemExit):
        main([path, "--add", "too much", "7", "1e-7"])
    assert "with too much it would be 8.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "there is no such file"),
        (["--limit", "8"], "--delta=None: give it with --limit"),
        (["--limit", "0", "--delta", "1e-6"], "epsilon=0.0: give a finite number above 0"),
        (["--limit", "8", "--delta", "2"], "delta=2.0"),
        (["--limit", "8", "--delta", "1e-6", "--unit", "x"], "--unit='x': is read only with --add"),
        (["--limit", "8", "--delta", "1e-6", "--add", "x", "much", "0"], "--add='much': give a number"),
        (["--limit", "8", "--delta", "1e-6", "--close", "x"], "0 trainings of this name"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], told: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([path, *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_a_file_without_a_limit_needs_a_delta(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    Budget(path).enter_gaussian("histogram", 10.0, unit=UNIT)
    with pytest.raises(SystemExit):
        main([path])
    assert "--delta=None: give it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (".", "is a folder; give a file"),
        ("gone/people.jsonl", "its folder does not exist; make it first"),
        ("file/people.jsonl", "its folder does not exist; make it first"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / name), "--limit", "8", "--delta", "1e-6"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f": {told}\n")
    assert not (tmp_path / "gone").exists()


def test_a_register_that_cannot_be_written_is_one_line(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Budget, "set_limit", refuse)
    with pytest.raises(SystemExit) as stopped:
        main([path, "--limit", "8", "--delta", "1e-6"])
    assert stopped.value.code == 2
    told = f"error: Permission denied: {path} cannot be used; check the path and who may write it\n"
    assert capsys.readouterr().err == told
