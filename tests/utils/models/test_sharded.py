"""Sharded models on one process; `tests/dptune/test_sharding.py` loads them on several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dptune import InvalidArgument
from dptune.sharding import ShardedBytes
from tests.tiny import tiny_llama
from tests.whole_models import CAUSAL
from utils.cli.launch import Sharding
from utils.models import sharded
from utils.models.sharded import decoder_layers, describe_shards, load_sharded_model

CPU = torch.device("cpu")


def test_decoder_layers_are_found_also_where_their_class_is_renamed() -> None:
    model = tiny_llama()
    assert decoder_layers(model) == list(model.model.layers)
    layer = model.model.layers[0]
    layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    assert decoder_layers(model) == list(model.model.layers)
    model._no_split_modules = None
    assert decoder_layers(model) == []


def test_the_line_tells_shard_whole_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20
    monkeypatch.setattr(sharded, "weight_bytes", lambda *_: ShardedBytes(held=3 * mib, total=4 * mib, root=mib))
    line = describe_shards(CAUSAL["Llama"](), 2)
    assert "3.0 MiB per rank of 4.0 MiB over 2 processes (at most 2.0 + root group 1.0)" in line
    with pytest.raises(RuntimeError):
        describe_shards(CAUSAL["Llama"](), 4)


def test_a_name_that_is_no_folder_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fail(name: str, **how: Any) -> str:
        asked.append({"name": name, **how})
        raise OSError("401 for it\nsecond line")

    monkeypatch.setattr(sharded, "snapshot_download", fail)
    how: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "sharding": Sharding()}
    told = r"^--model_name_or_path='no/such': could not be downloaded \(OSError: 401 for it\); give a folder"
    with pytest.raises(InvalidArgument, match=told):
        load_sharded_model("no/such", token="key", revision="v1", **how)
    (one,) = asked
    assert (one["token"], one["revision"]) == ("key", "v1")
    assert "*.safetensors" in one["allow_patterns"]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_one_rank_holds_the_whole_model_frozen(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    ids = torch.arange(3, 20)[None]
    model = load_sharded_model(str(tmp_path / "model"), dtype=torch.float32, device=CPU, sharding=Sharding())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert "over 1 processes" in describe_shards(model, 1)
