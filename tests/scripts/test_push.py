"""Only a checked folder is uploaded, privately unless asked otherwise; a mistake is one line. No network is used."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from dptune.report.card import LORA_ADAPTER
from dptune.report.publish import publish
from scripts import push
from tests.dptune.report.test_check import private_run
from tests.dptune.report.test_check import save as save_adapter
from tests.dptune.report.test_statement import not_private

pytestmark = pytest.mark.usefixtures("no_plots")


class Hub:
    """A stand-in for the hub's client that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.private: bool | None = None  # of a repository that exists
        self.error: Exception | None = None

    def create_repo(self, *, repo_id: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append((repo_id, {"private": private}))
        if self.error is not None:
            raise self.error
        if self.private is None:
            self.private = private

    def model_info(self, *, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(id=repo_id, private=self.private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        assert "dptune" in commit_message
        self.calls.append((repo_id, {"files": sorted(path.name for path in folder_path.iterdir())}))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a private run publishes."""
    return private_run(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, for a user who is logged in."""
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return made


def refused(*words: object, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        push.main([str(word) for word in words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("method", ["create_repo", "model_info", "upload_folder"])
def test_the_stand_in_is_called_as_the_client_is(method: str) -> None:
    used, known = (set(inspect.signature(getattr(one, method)).parameters) for one in (Hub, huggingface_hub.HfApi))
    assert used <= known


@pytest.mark.parametrize("how", [[], ["--public"]])
def test_the_folder_alone_is_uploaded(
    folder: Path,
    how: list[str],
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push.main([str(folder.parent), "ann/model", *how])
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "epsilon.png", "ledger.jsonl"]
    uploaded = sorted([*files, "SHA256SUMS", "privacy_report.json", "tokenizer_config.json"])
    assert hub.calls == [("ann/model", {"private": not how}), ("ann/model", {"files": uploaded})]
    told = capsys.readouterr().out
    assert "checked                epsilon" in told
    assert "uploaded               https://hub/ann/model/commit/1" in told
    push.main([str(folder), "ann/model", *how])  # the folder itself is taken too
    assert len(hub.calls) == 4


def test_a_merged_model_is_uploaded_from_its_own_folder(
    folder: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = folder.rename(tmp_path / "merged")
    push.main([str(merged), "ann/model"])
    assert "privacy_report.json" in hub.calls[-1][1]["files"]
    (merged / "privacy_report.json").unlink()
    assert "RUN=" in (told := refused(merged, "ann/model", capsys=capsys))
    assert "or of a model merged from one" in told


def test_what_the_check_refuses_is_not_uploaded(
    folder: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "diagnostics.jsonl").touch()
    assert "file='diagnostics.jsonl'" in refused(folder.parent, "ann/model", capsys=capsys)
    assert hub.calls == []


def test_a_model_without_privacy_must_be_asked_for(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path, not_private(), save_adapter, ledger=None, base_model="ann/base", artifact=LORA_ADAPTER)
    told = refused(tmp_path, "ann/model", capsys=capsys)
    assert "--without_privacy=False: the model has no guarantee (the noise seed was fixed by hand)" in told
    assert hub.calls == []
    push.main([str(tmp_path), "ann/model", "--without_privacy"])
    assert "privacy                NONE" in capsys.readouterr().out
    assert len(hub.calls) == 2


def test_a_repository_that_is_public_already_needs_the_flag(
    folder: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.private = False
    assert "REPOSITORY='ann/model': is public already" in refused(folder, "ann/model", capsys=capsys)
    assert all("files" not in call for _, call in hub.calls)
    push.main([str(folder), "ann/model", "--public"])
    assert "files" in hub.calls[-1][1]


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach https://hub: offline mode is enabled."),
        OSError("name resolution failed\nand more"),
    ],
)
def test_what_the_hub_raises_is_one_line(
    folder: Path,
    error: Exception,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.error = error
    line = refused(folder, "ann/model", capsys=capsys)
    assert f"REPOSITORY='ann/model': nothing was uploaded ({type(error).__name__}: {str(error).splitlines()[0]}" in line


def test_mistakes_are_one_line(
    folder: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert "the following arguments are required: REPOSITORY" in refused(folder, capsys=capsys)
    (tmp_path / "empty").mkdir()
    assert "holds no folder publish" in refused(tmp_path / "empty", "ann/model", capsys=capsys)
    assert "holds no folder publish" in refused(tmp_path / "missing", "ann/model", capsys=capsys)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN=None: there is no token of the hub; run `hf auth login`" in refused(folder, "a/b", capsys=capsys)
    assert hub.calls == []
