"""A folder is complete or missing, even if writing fails or a crash left a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from utils.files.folders import write_folder


def filling(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
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
