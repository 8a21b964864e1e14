"""A model with sharded weights is written as `save_pretrained` would write it whole, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dptune.integrations import sharded_saving
from dptune.integrations.sharded_saving import write_sharded
from dptune.sharding import shard
from tests.processes import run_processes
from tests.whole_models import whole_model
from utils.models.sharded import decoder_layers

NAMES = ["GPT-2", "GPT-2, untied", "Llama", "Llama, tied", "OPT", "Gemma 2", "Gemma 3"]


def model_of(name: str) -> Any:
    return whole_model(name).float()


def _write(rank: int, _gather: Callable[[Tensor], Tensor], folder: Path) -> None:
    for name in NAMES:
        model = model_of(name)
        shard(model.requires_grad_(False), decoder_layers(model), device=torch.device("cpu"))
        model(torch.ones(1, 3, dtype=torch.long))  # leaves the root group gathered
        for size, kind in ((1 << 31, "one file"), (20_000, "several files")):
            sharded_saving._FILE_BYTES = size
            write_sharded(model, folder / kind / name if rank == 0 else None)


def _write_again(_rank: int, _gather: Callable[[Tensor], Tensor], folder: Path) -> None:
    """Several files, then a single one, in the same folder."""
    model = model_of("Llama")
    shard(model.requires_grad_(False), decoder_layers(model), device=torch.device("cpu"))
    for size in (20_000, 1 << 31):
        sharded_saving._FILE_BYTES = size
        write_sharded(model, folder)


def test_weights_under_other_names_are_removed(tmp_path: Path) -> None:
    (tmp_path / "model.txt").touch()
    run_processes(1, _write_again, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.txt", "model.safetensors", "config.json", "generation_config.json"),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    run_processes(2, _write, folder)
    return folder


@pytest.mark.parametrize("kind", ["one file", "several files"])
@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_reads_the_same_model(name: str, kind: str, written: Path) -> None:
    wanted, folder = model_of(name), written / kind / name
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model) is type(wanted)
    assert model.dtype == torch.float32
    for (key, value), (own, found) in zip(wanted.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == own
        assert torch.equal(value, found), key


@pytest.mark.parametrize("name", NAMES)
def test_the_files_hold_what_save_pretrained_writes(name: str, written: Path, tmp_path: Path) -> None:
    model_of(name).save_pretrained(tmp_path)
    own, folder = load_file(tmp_path / "model.safetensors"), written / "one file" / name
    found = load_file(folder / "model.safetensors")
    assert found.keys() == own.keys()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for file_name in ("config.json", "generation_config.json"):
        wanted = json.loads((tmp_path / file_name).read_text())
        assert json.loads((folder / file_name).read_text()) == wanted, file_name


def test_a_large_model_becomes_several_files_with_an_index(written: Path) -> None:
    folder = written / "several files" / "Llama"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {path.name for path in folder.glob("*.safetensors")}
