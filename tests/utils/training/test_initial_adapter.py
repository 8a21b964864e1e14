"""`--initial_adapter`: which adapters a private run may start from, and what is said about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dptune import InvalidArgument, add_lora, save_adapter
from dptune.report.statement import REPORT_NAME, write_privacy_report
from tests.dptune.report.test_statement import not_private, private
from tests.tiny import tiny_llama
from utils.training.initial_adapter import describe_start, initial_releases, start_identity
from utils.training.lora_arguments import LoraArguments


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that left an adapter."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    model = tiny_llama()
    add_lora(model, rank=2, targets=["q_proj"])
    save_adapter(model, folder, base_model="base")
    return folder


def releases(path: Path, *, private: bool = True, **flags: Any) -> Any:
    return initial_releases(LoraArguments(initial_adapter=str(path), **flags), private=private)


def test_without_an_adapter_there_is_nothing_to_tell() -> None:
    found = initial_releases(LoraArguments(), private=True)
    assert (found, start_identity(found), describe_start(found)) == ((), {}, [])


@pytest.mark.parametrize("given", [".", "lora_weights.bin", "adapter_model.safetensors"])
def test_an_adapter_with_a_guarantee_is_taken_and_named_by_its_run(run: Path, given: str) -> None:
    write_privacy_report(run / REPORT_NAME, private())
    (found,) = releases(run / given)
    assert (found.name, found.epsilon, found.declared_public) == ("earlier", 2.25712345, False)
    assert describe_start([found]) == ["starts from            earlier, epsilon 2.2572 of its own"]
    assert start_identity([found])["initial_adapter"][0]["sha256"] == found.sha256


def test_an_adapter_that_is_published_has_the_name_of_its_run(run: Path) -> None:
    published = run / "publish"
    published.mkdir()
    for name in ("lora_weights.bin", "adapter_config.json", "adapter_model.safetensors"):
        (run / name).rename(published / name)
    write_privacy_report(published / REPORT_NAME, private())
    assert releases(published)[0].name == "earlier"


@pytest.mark.parametrize("reported", [False, True])
def test_an_adapter_without_a_guarantee_must_be_declared_public(run: Path, reported: bool) -> None:
    if reported:
        write_privacy_report(run / REPORT_NAME, not_private())
    with pytest.raises(
        InvalidArgument, match=r"^--initial_adapter=.*would not count.*give --initial_adapter_is_public"
    ):
        releases(run)
    assert releases(run, initial_adapter_is_public=True)[0].declared_public
    assert releases(run, private=False)[0].epsilon is None


def test_other_weights_are_another_start(run: Path) -> None:
    before = releases(run, private=False)
    model = tiny_llama()
    add_lora(model, rank=2, targets=["k_proj"])
    save_adapter(model, run, base_model="base")
    assert start_identity(releases(run, private=False)) != start_identity(before)


@pytest.mark.parametrize("place", ["missing", "."])
def test_a_path_without_an_adapter_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--initial_adapter=.*no adapter there"):
        releases(tmp_path / place)
