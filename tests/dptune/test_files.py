"""Atomic and synced writing: what is on disk after a crash."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dptune._files import append_line, atomic_write, sync_tree, write_folder


def test_text_and_bytes_arrive_whole(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "text") as file:
        file.write("ε\nδ\n")
    with atomic_write(tmp_path / "bytes", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "ε\nδ\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bytes", "text"]


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "report"
    target.write_text("old")
    with atomic_write(target) as file:
        file.write("new")
        file.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def _write_and_fail(target: Path, error: type[BaseException]) -> None:
    with atomic_write(target) as file:
        file.write("half")
        file.flush()
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "report"
    target.write_text("old")
    with pytest.raises(error):
        _write_and_fail(target, error)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert target.read_text() == "old"


def test_a_process_that_dies_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report"
    target.write_text("old")
    code = (
        "import os, sys; from dptune._files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write('half'); file.flush(); os._exit(9)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(target)], cwd=root, check=False).returncode == 9
    assert target.read_text() == "old"


def test_data_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        calls.append("fsync")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "report") as file:
        file.write("x")
    assert calls[:2] == ["fsync", "replace"]


def test_every_file_and_name_of_a_folder_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "below/b", "below/deeper/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    sync_tree(tmp_path)
    assert synced == {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}


def test_a_failing_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report"
    target.write_text("old")

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(target) as file:
        file.write("new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_the_file_gets_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "report") as file:
            file.write("x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "report").stat().st_mode) == 0o644


def test_lines_append_and_are_synced_before_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger"
    on_disk: list[int] = []
    real_sync = os.fsync

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            on_disk.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", sync)
    append_line(path, "one")
    append_line(path, "zwei ε")
    assert path.read_text(encoding="utf-8") == "one\nzwei ε\n"
    assert on_disk == [4, 4 + len("zwei ε\n".encode())]


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_text('{"step": 1}\n{"st')
    append_line(path, '{"step": 2}')
    assert path.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']


def test_two_lines_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="one line"):
        append_line(tmp_path / "ledger", "a\nb")


def filling(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / text).write_text(text)

    return write


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_folder(tmp_path / "out", filling(text))
        assert content(tmp_path / "out") == [text]
    assert content(tmp_path) == ["out"]


def test_an_error_halfway_leaves_the_old_folder(tmp_path: Path) -> None:
    def failing(folder: Path) -> None:
        filling("new")(folder)
        raise RuntimeError("halfway")

    write_folder(tmp_path / "out", filling("old"))
    with pytest.raises(RuntimeError, match="halfway"):
        write_folder(tmp_path / "out", failing)
    assert content(tmp_path / "out") == ["old"]
    assert content(tmp_path) == ["out"]


def test_two_writers_at_once_do_not_touch_each_others_half(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        filling("first")(folder)
        write_folder(tmp_path / "out", filling("second"))
        assert content(folder) == ["first"]

    write_folder(tmp_path / "out", interrupted)
    assert content(tmp_path / "out") == ["first"]
    assert content(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("no")
        return rename(self, target)

    write_folder(tmp_path / "out", filling("old"))
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "out", filling("new"))
    assert content(tmp_path / "out") == ["old"]
    assert content(tmp_path) == ["out"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_that_only_the_owner_may_read_get_the_readers_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        filling("own")(folder)
        for path in folder.iterdir():
            path.chmod(0o600)

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "out", write)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()] == [mode]
