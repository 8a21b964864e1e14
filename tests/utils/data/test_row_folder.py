"""The folder of tokenised rows: private, whole or not there, used again for the same rows alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from tests.processes import run_processes
from utils.data.encoding import Encoded
from utils.data.row_arrays import ArrayWriter
from utils.data.row_folder import RowFolder, Splits, clear_leftovers

KEY = {"--block_size": 8, "training data": ["a", 1]}


def make(folder: Path) -> Splits:
    with ArrayWriter(folder, "train") as writer:
        writer.add(Encoded(np.arange(3, dtype=np.int32), np.ones(3, dtype=bool), np.array([3], dtype=np.int32), 0))
        return {"train": writer.stored()}


def fails(folder: Path) -> Splits:
    make(folder)
    raise InvalidArgument("--train_file", "x", "row 7 is bad")


def never(_: Path) -> Splits:
    pytest.fail("the rows are made again")


def test_a_runs_own_folder_is_private_and_goes_with_the_folders_that_it_made(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    folder = RowFolder(KEY, run_folder=run, number=3)
    path, splits = folder.prepare(make)
    assert (path.parent, path.name, path.stat().st_mode & 0o777) == (run, ".rows-3", 0o700)
    assert splits["train"].tokens == 3
    folder.discard()
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_with_other_files_stays(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").touch()
    folder = RowFolder(KEY, run_folder=tmp_path)
    folder.prepare(make)
    folder.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_a_dry_run_uses_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cache in (None, str(tmp_path / "cache")):
        folder = RowFolder(KEY, cache=cache)
        path, _ = folder.prepare(make)
        assert (path.parent, path.stat().st_mode & 0o777) == (tmp_path, 0o700)
        folder.discard()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["run", "temporary"])
def test_a_failure_leaves_nothing(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InvalidArgument, match="row 7 is bad"):
        RowFolder(KEY, run_folder=tmp_path / "run" if where == "run" else None).prepare(fails)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_crash_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".rows-8").mkdir()
    (tmp_path / ".rows-8" / "train.ids").touch()
    (tmp_path / "checkpoint-1").mkdir()
    clear_leftovers(tmp_path)
    clear_leftovers(None)
    clear_leftovers(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_cache_is_private_and_used_again_for_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    first = RowFolder(KEY, cache=str(cache), run_folder=tmp_path / "run")
    path, splits = first.prepare(make)
    first.discard()
    assert (path, cache.stat().st_mode & 0o777) == (cache, 0o700)
    assert {one.stat().st_mode & 0o077 for one in cache.glob("train.*")} == {0}
    assert not capsys.readouterr().out
    for run in (tmp_path / "run", None):
        assert RowFolder(dict(KEY), cache=str(cache), run_folder=run).prepare(never) == (cache, splits)
        assert capsys.readouterr().out == f"tokenised rows         from {cache}, made by an earlier run\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"--block_size": 16}, "made with another --block_size; give another folder, or remove this one"),
        ({"training data": ["a", 2], "--seed": 1}, "made with another training data, --seed;"),
    ],
)
def test_a_cache_of_other_rows_is_refused_and_stays(tmp_path: Path, change: dict[str, object], told: str) -> None:
    RowFolder(KEY, cache=str(tmp_path), run_folder=tmp_path).prepare(make)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for run in (tmp_path, None):
        with pytest.raises(InvalidArgument, match=f"--data_cache=.*{told}"):
            RowFolder({**KEY, **change}, cache=str(tmp_path), run_folder=run).prepare(never)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_cache_is_whole_or_made_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(InvalidArgument, match="row 7 is bad"):
        RowFolder(KEY, cache=str(cache), run_folder=tmp_path).prepare(fails)
    assert [path.name for path in cache.iterdir()] == [".rows.lock"]
    make(cache)  # as a process leaves it that was killed
    (cache / "train.names").touch()
    RowFolder(KEY, cache=str(cache), run_folder=tmp_path).prepare(make)
    assert sorted(path.name for path in cache.iterdir()) == [
        *(".rows.lock", "rows.json", "train.ids", "train.is_answer", "train.starts")
    ]


@pytest.mark.parametrize("name", ["train.jsonl", "my.ids", "train.ids.bak", "notes", ".lock"])
def test_a_folder_with_files_of_others_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidArgument, match=rf"--data_cache=.*holds other files \({name}\); give a new or an empty"):
        RowFolder(KEY, cache=str(tmp_path), run_folder=tmp_path).prepare(never)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_and_a_damaged_description_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="is a file; give a folder"):
        RowFolder(KEY, cache=str(tmp_path / "file"), run_folder=tmp_path).prepare(never)
    for damaged in ("{", "[]", json.dumps({"made_from": KEY, "rows": {"train": {"tokens": 1}}})):
        (tmp_path / "rows.json").write_text(damaged)
        with pytest.raises(InvalidArgument, match=r"rows\.json is damaged; remove the folder"):
            RowFolder(KEY, cache=str(tmp_path), run_folder=tmp_path).prepare(never)


def _prepare(rank: int, gather: object, folder: Path) -> int:  # noqa: ARG001
    def slowly(path: Path) -> Splits:
        with (folder / "made").open("a") as file:
            file.write(f"{rank}\n")
        return make(path)

    path, splits = RowFolder(KEY, cache=str(folder / "cache"), run_folder=folder).prepare(slowly)
    return splits["train"].tokens + len((path / "train.ids").read_bytes())


def test_two_runs_that_share_a_cache_make_it_once(tmp_path: Path) -> None:
    assert run_processes(2, _prepare, tmp_path) == [15, 15]
    assert len((tmp_path / "made").read_text().splitlines()) == 1
