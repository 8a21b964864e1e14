"""Folders that leave nothing, and the settings that a training recorded beside its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.files.folders import (
    missing_folders,
    recorded_by_training,
    remove_empty,
    require_new_file,
    require_new_folder,
)


def test_only_empty_folders_are_removed(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    missing = missing_folders(deep)
    assert missing == [deep, deep.parent, deep.parent.parent]
    deep.mkdir(parents=True)
    (tmp_path / "a" / "kept").touch()
    remove_empty(missing)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_folder_for_results_must_be_new(tmp_path: Path) -> None:
    require_new_folder(str(tmp_path / "new"))
    require_new_folder(str(tmp_path))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InvalidArgument, match=r"--output_dir=.*: is there already"):
            require_new_folder(str(path))
    with pytest.raises(InvalidArgument, match=r"--into=.*: the folder that it lies in does not exist"):
        require_new_folder(str(tmp_path / "gone" / "new"), "--into")


@pytest.mark.parametrize("trained", ["publish/lora_weights.bin", "publish", ".", "checkpoint-2/lora_weights.bin"])
def test_a_setting_is_found_from_everything_that_a_training_leaves(trained: str, tmp_path: Path) -> None:
    for folder in ("publish", "checkpoint-2"):
        (tmp_path / folder).mkdir()
    assert list(recorded_by_training(tmp_path / trained, "style")) == []
    (tmp_path / "run_config.json").write_text(json.dumps({"style": "chat"}))
    assert list(recorded_by_training(tmp_path / trained, "style")) == ["chat"]
    (tmp_path / "publish" / "dptune_settings.json").write_text(json.dumps({"style": "plain"}))
    found = list(recorded_by_training(tmp_path / trained, "style"))
    assert found == (["chat"] if "checkpoint" in trained else ["plain", "chat"])


def test_a_published_folder_alone_knows_its_settings(tmp_path: Path) -> None:
    (tmp_path / "dptune_settings.json").write_text(json.dumps({"style": "chat"}))
    assert list(recorded_by_training(tmp_path / "lora_weights.bin", "style")) == ["chat"]
    (tmp_path / "dptune_settings.json").write_text("{")
    assert list(recorded_by_training(tmp_path, "style")) == []


def test_a_file_for_results_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (None, str(tmp_path / "new.png")):
        require_new_file(path, "--plot", ".png")
    (tmp_path / "folder.png").mkdir()
    for name, told in (
        ("new.docx", r"give a name that ends in \.png"),
        ("gone/new.png", "its folder does not exist; make it first"),
        ("folder.png", "is a folder; give a file"),
    ):
        with pytest.raises(InvalidArgument, match=rf"^--plot=.*{name}'?: {told}"):
            require_new_file(str(tmp_path / name), "--plot", ".png")
    monkeypatch.setattr("os.access", lambda *_: False)  # for the superuser every folder can be written
    with pytest.raises(InvalidArgument, match="its folder cannot be written to"):
        require_new_file(str(tmp_path / "new.png"), "--plot", ".png")
