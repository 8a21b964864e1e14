"""Sharded weights on real processes: read in slices, bit-equal to the whole model, and no rank has a whole copy."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dptune import InvalidArgument, add_lora, trainable_parameters
from dptune.per_example.fixed_values import FixedValues, every
from dptune.sharding import (
    ShardedBytes,
    as_forward,
    checkpoint_files,
    compute_device,
    is_sharded,
    local_part,
    shard,
    weight_bytes,
)
from tests.processes import run_processes
from tests.tiny import save_tiny, tiny_llama
from utils.cli.launch import Sharding
from utils.models.loading import load_model
from utils.models.sharded import decoder_layers, describe_shards

IDS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    return load_model(str(folder), dtype=dtype, device=CPU, sharding=Sharding(**how))


@torch.no_grad()
def logits_and_bytes(_rank: int, _gather: Any, folder: Path, dtype: torch.dtype, how: dict[str, Any]) -> dict[str, Any]:
    model = load(folder, dtype, **how)
    held = weight_bytes(model, decoder_layers(model))
    logits = model(IDS).logits
    after = weight_bytes(model, decoder_layers(model))
    return {"logits": logits, "held": held, "after": after, "tied": model.config.tie_word_embeddings}


def save(folder: Path, *, tie: bool = False, shard_size: str = "10GB") -> Path:
    tiny_llama(tie=tie).save_pretrained(folder, max_shard_size=shard_size)
    return folder


CASES = {
    "one file": (2, {}, torch.float32, {}),
    "many files": (2, {"shard_size": "20KB"}, torch.float32, {}),
    "tied": (2, {"tie": True}, torch.float32, {}),
    "offloaded": (2, {}, torch.float32, {"cpu_offload": True}),
    "kept after forward": (2, {}, torch.float32, {"reshard_after_forward": False}),
    "bf16": (2, {}, torch.bfloat16, {}),
    "fp16, three ranks that divide nothing": (3, {}, torch.float16, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_unsharded_models_to_the_bit(name: str, tmp_path: Path) -> None:
    world_size, saving, dtype, how = CASES[name]
    folder = save(tmp_path, **saving)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        wanted = whole(IDS).logits
    total = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    for rank in run_processes(world_size, logits_and_bytes, folder, dtype, how):
        assert torch.equal(rank["logits"], wanted)
        assert rank["held"].total == total, "a tied weight counts once"
        assert rank["held"].held <= total / world_size + rank["held"].root
        assert rank["held"].root < total / 1.5
        if how.get("reshard_after_forward", True):  # the root group stays gathered, the layers are dropped
            assert rank["held"].held < rank["after"].held <= rank["held"].held + rank["held"].root
            assert rank["after"].held < total
        else:
            assert rank["after"].held == total


def peak_of_loading(_rank: int, _gather: Any, folder: Path) -> tuple[float, int]:
    """(this process's own peak memory while it loads, size of the model), in bytes."""
    load(folder, torch.bfloat16)  # the first load of anything also costs memory that is not for weights
    before, peak, ended = _own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.0005):
            peak[0] = max(peak[0], _own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(folder)
    ended.set()
    watcher.join()
    return peak[0] - before, weight_bytes(model, []).total


def _own_memory() -> int:
    """Bytes of memory that only this process holds, without mapped files (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_no_process_holds_a_whole_copy_while_it_loads(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, hidden=512, layers=8)
    for peak, total in run_processes(2, peak_of_loading, folder):
        assert total > 60e6
        assert peak < 0.7 * total, f"{peak / total:.2f} of the model at once, where a half is this rank's share"


@torch.no_grad()
def generate(rank: int, _gather: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Each rank generates from a different prompt, to a different length."""
    how: dict[str, Any] = {"max_new_tokens": 4 + 5 * rank, "do_sample": False, "eos_token_id": None}
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = IDS[:, : 5 + rank]
    return load(folder).generate(ids, synced_gpus=True, **how), whole.generate(ids, **how)


def test_ranks_with_unequal_work_generate_without_waiting_for_ever(tiny_model_dir: Path) -> None:
    for sharded, whole in run_processes(2, generate, tiny_model_dir):
        assert torch.equal(sharded, whole)


def adapters_stay_whole(_rank: int, _gather: Any, folder: Path) -> tuple[int, str, list[str]]:
    model = load(folder)
    frozen = weight_bytes(model, decoder_layers(model))
    add_lora(model, rank=4)
    assert weight_bytes(model, decoder_layers(model)) == frozen, "adapters are not among the frozen weights"
    model(IDS).logits.sum().backward()
    parameters = trainable_parameters(model)
    kinds = sorted({type(parameter).__name__ for parameter in parameters})
    return sum(parameter.numel() for parameter in parameters), describe_shards(model, 2), kinds


def test_adapters_are_ordinary_tensors_on_every_rank(tiny_model_dir: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    add_lora(whole, rank=4)
    for size, line, kinds in run_processes(2, adapters_stay_whole, tiny_model_dir):
        assert size == sum(parameter.numel() for parameter in trainable_parameters(whole))
        assert kinds == ["Parameter"]
        assert "over 2 processes" in line


def test_more_than_a_shard_is_an_error() -> None:
    ShardedBytes(held=60, total=100, root=10).require_bound(2)
    with pytest.raises(RuntimeError, match="61 bytes of weights on this rank, more than the 60"):
        ShardedBytes(held=61, total=100, root=10).require_bound(2)


def test_an_unsharded_model_holds_everything() -> None:
    model = tiny_llama()
    held = weight_bytes(model.requires_grad_(False), decoder_layers(model))
    assert held.held == held.total == sum(4 * parameter.numel() for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="bytes of weights on this rank"):
        describe_shards(model, 4)


def test_a_function_on_an_unsharded_model_is_itself() -> None:
    def function() -> None: ...

    assert as_forward(tiny_llama(), function) is function
    assert not is_sharded(tiny_llama())


def test_it_computes_where_its_buffers_are() -> None:
    model: Any = nn.Linear(2, 2, device="meta")
    assert compute_device(model) == torch.device("meta")
    model.register_buffer("positions", torch.arange(2))
    assert compute_device(model) == CPU


def test_a_model_with_something_to_train_or_without_layers_is_not_sharded() -> None:
    model = tiny_llama()
    with pytest.raises(InvalidArgument, match=r"model='model\.embed_tokens\.weight': is trainable"):
        shard(model, decoder_layers(model), device=CPU)
    with pytest.raises(InvalidArgument, match="no decoder layer"):
        shard(model.requires_grad_(False), [], device=CPU)


def refusal(_rank: int, _gather: Any, folder: Path) -> str:
    with pytest.raises(InvalidArgument) as refused:
        load(folder)
    return str(refused.value)


def test_a_weight_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model") / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path)
    assert f"has no weight {name}" in run_processes(1, refusal, path.parent)[0]
    save_file(weights | {name: torch.zeros(3, 5)}, path)
    assert f"{name}'" in (told := run_processes(1, refusal, path.parent)[0])
    assert "(3, 5)" in told


def test_a_checkpoint_of_the_backbone_alone_has_its_prefix_added(tmp_path: Path) -> None:
    """A tied model saved without its head has no `model.` in front of its names."""
    folder = save(tmp_path, tie=True)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    weights = load_file(folder / "model.safetensors")
    save_file({key.removeprefix("model."): value for key, value in weights.items()}, folder / "model.safetensors")
    (rank,) = run_processes(1, logits_and_bytes, folder, torch.float32, {})
    assert torch.equal(rank["logits"], wanted)


def test_files_are_looked_for_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="has no safetensors"):
        checkpoint_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InvalidArgument, match=r"gone\.safetensors, which is missing"):
        checkpoint_files(tmp_path)


@torch.no_grad()
def compared(_rank: int, _gather: Any, folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """What is kept of sharded weights after a forward pass, and whether one rank's change of its shard is found."""
    model = load(folder, **how)
    fixed = FixedValues(model, every)
    model(IDS)
    fixed.require_unchanged()
    held = weight_bytes(model, decoder_layers(model))
    name, weight = next((name, one) for name, one in model.named_parameters() if "down_proj" in name)
    local_part(weight)[0, 0] += 1
    try:
        fixed.require_unchanged()
    except InvalidArgument as error:
        return {"held": held, "found": error.name == name}
    return {"held": held, "found": False}


@pytest.mark.parametrize("how", [{}, {"reshard_after_forward": False}, {"cpu_offload": True}])
def test_fixed_weights_are_compared_without_gathering_them(how: dict[str, Any], tmp_path: Path) -> None:
    for rank in run_processes(2, compared, save(tmp_path), how):
        assert rank["found"]
        assert rank["held"].held <= rank["held"].total / 2 + rank["held"].root
