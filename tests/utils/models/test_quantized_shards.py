"""Bases in 4 and 8 bits, sharded: to the bit the unsharded quantised model, and no rank ever has a whole weight."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import dptune.sharding
from dptune import CausalLMLoss, InvalidArgument, Ledger, PrivateStep, add_lora, deal
from dptune.sharding import weight_bytes
from tests.dptune.test_sharding import CASES as CASES_OF_SHARDS
from tests.examples import padded, random_examples, randomise_adapters
from tests.private_sum import NoNoise, config_for, private_sum
from tests.processes import run_processes
from tests.tiny import save_tiny, tiny_llama
from tests.utils.models.test_quantization import EXAMPLES as ORDINARY
from tests.utils.models.test_quantization import HUGE, OUTLIER, gradients, relative
from utils.cli.launch import Sharding
from utils.models import quantized_shards
from utils.models.loading import checkpoint_activations, load_model
from utils.models.memory import MemorySettings, memory_needs
from utils.models.quantized_shards import ShardedLinear, ShardedLinear4bit, ShardedLinear8bit, quantized_rows
from utils.models.sharded import decoder_layers, describe_shards
from utils.models.sizes import model_sizes

IDS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")
KINDS: dict[int, type[ShardedLinear]] = {4: ShardedLinear4bit, 8: ShardedLinear8bit}


def load(folder: Path, bits: int, dtype: torch.dtype = torch.float32, *, sharded: bool = True, **how: bool) -> Any:
    sharding = Sharding(**how) if sharded else None
    return load_model(str(folder), dtype=dtype, device=CPU, bits=bits, sharding=sharding)


def opt() -> nn.Module:
    """With biases, and two linear layers outside of the decoder's."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64, word_embed_proj_dim=128, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=400
    )
    return OPTForCausalLM(config).eval()


def save(folder: Path, *, kind: str = "llama", tie: bool = False, shard_size: str = "10GB") -> Path:
    model = opt() if kind == "opt" else tiny_llama(hidden=64, tie=tie)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)  # type: ignore[operator]
    return folder


@torch.no_grad()
def logits_and_bytes(
    _rank: int, _gather: Any, folder: Path, bits: int, dtype: torch.dtype, how: dict[str, Any]
) -> dict[str, Any]:
    model = load(folder, bits, dtype, **how)
    held = weight_bytes(model, decoder_layers(model))
    describe_shards(model, torch.distributed.get_world_size())
    return {"logits": model(IDS).logits, "held": held}


CASES: dict[str, tuple[int, dict[str, Any], torch.dtype, dict[str, bool]]] = {
    **CASES_OF_SHARDS,
    "biases": (2, {"kind": "opt"}, torch.float32, {}),
    "biases in bf16": (2, {"kind": "opt"}, torch.bfloat16, {}),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_unsharded_quantised_models_to_the_bit(name: str, bits: int, tmp_path: Path) -> None:
    world_size, saving, dtype, how = CASES[name]
    folder = save(tmp_path, **saving)
    whole = load(folder, bits, dtype, sharded=False)
    with torch.no_grad():
        wanted = whole(IDS).logits
    total = sum(parameter.untyped_storage().nbytes() for parameter in whole.parameters())
    for layer in whole.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            total += layer.weight.quant_state.absmax.untyped_storage().nbytes()
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            total += layer.state.SCB.untyped_storage().nbytes()
    for rank in run_processes(world_size, logits_and_bytes, folder, bits, dtype, how):
        assert torch.equal(rank["logits"], wanted)
        assert rank["held"].total == total
        assert rank["held"].held <= total / world_size + rank["held"].root + 2 * 2 * 7 * 64  # rows that do not divide


EXAMPLES = random_examples(12, seed=3)
LENGTHS = np.array([len(ids) for ids, _ in EXAMPLES])
CONFIG = config_for(12, clip_norm=0.05)


def adapted(folder: Path, bits: int, **how: Any) -> Any:
    model = load(folder, bits, **how).train()
    add_lora(model, rank=4, targets=("q_proj", "down_proj", "lm_head"))
    randomise_adapters(model)
    return model


def clipped_sum(rank: int, gather: Any, folder: Path, bits: int, checkpointing: bool) -> Tensor:
    model = adapted(folder / "model", bits)
    if checkpointing:
        checkpoint_activations(model)
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ledger = Ledger(folder / "ledger.jsonl")
    noise: Any = NoNoise(size)
    with PrivateStep(model, CONFIG, ledger=ledger, noise=noise, gather=gather, rank=rank, world_size=2) as step:
        for rows in deal(np.arange(12), LENGTHS, token_budget=64, ranks=2)[rank]:
            step.backward(CausalLMLoss(model)(*padded([EXAMPLES[row] for row in rows])))
        step.finish()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) * CONFIG.divisor


@pytest.mark.parametrize(("bits", "checkpointing"), [(4, False), (4, True), (8, True)])
def test_the_clipped_sum_is_that_of_one_process(bits: int, checkpointing: bool, tmp_path: Path) -> None:
    save(tmp_path / "model")
    wanted = private_sum(adapted(tmp_path / "model", bits, sharded=False), EXAMPLES, list(range(12)), CONFIG)
    one, other = run_processes(2, clipped_sum, tmp_path, bits, checkpointing)
    assert torch.equal(one, other)
    assert (one - wanted).norm() < 1e-6 * wanted.norm()


# Older versions of FSDP would cast whole numbers too. The project asks for no cast.
CAST = torch.bfloat16 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else None


def gathered(_rank: int, _gather: Any, folder: Path, bits: int) -> dict[str, Any]:
    """The bytes that layers compute with, where FSDP casts to CAST, and the rows that were quantised here."""
    cast = partial(fully_shard, mp_policy=MixedPrecisionPolicy(param_dtype=CAST))
    rows: dict[int, list[int]] = defaultdict(list)
    real, patch = quantized_shards.quantized_rows, pytest.MonkeyPatch()  # the process ends with this
    patch.setattr(dptune.sharding, "fully_shard", cast)
    patch.setattr(
        quantized_shards, "quantized_rows", lambda kind, part: rows[part.shape[1]].append(len(part)) or real(kind, part)
    )
    model = load(folder, bits)
    seen: dict[str, Any] = {}

    def look(layer: Any, _inputs: Any, *, name: str) -> None:
        seen[name] = layer.weight.detach().clone(), layer.scales.detach().clone()

    for name, layer in model.named_modules():
        if isinstance(layer, ShardedLinear):
            layer.register_forward_pre_hook(partial(look, name=name))
        if name.endswith("input_layernorm"):
            layer.register_forward_pre_hook(lambda module, _: seen.update(norm=module.weight.dtype))
    with torch.no_grad():
        model(IDS)
    return {"seen": seen, "rows": dict(rows)}


@pytest.mark.parametrize(("bits", "kind"), KINDS.items())
def test_packed_bytes_survive_casts_and_no_rank_quantises_more_than_its_rows(
    bits: int, kind: type[ShardedLinear], tmp_path: Path
) -> None:
    folder = save(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for rank in run_processes(3, gathered, folder, bits):
        seen = rank["seen"]
        assert seen.pop("norm") == (CAST or torch.float32), "FSDP casts the other weights of the layer"
        assert len(seen) == 2 * 7
        for name, (packed, scales) in seen.items():
            wanted = quantized_rows(kind, weights[f"{name}.weight"])
            assert torch.equal(packed, wanted[0])
            assert torch.equal(scales, wanted[1])
        assert 42 <= max(rank["rows"][64]) <= 43, "a third of 128 rows"
        assert 20 <= max(rank["rows"][128]) <= 22, "a third of 64 rows"


def test_rows_quantised_apart_are_the_whole_weight_quantised() -> None:
    weight = torch.randn(10, 192)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    found, scales = in_parts(ShardedLinear4bit, weight)
    assert torch.equal(found.view(-1, 1), packed)
    assert torch.equal(scales, state.absmax)
    packed, row_scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    found, scales = in_parts(ShardedLinear8bit, weight)
    assert torch.equal(found, packed)
    assert torch.equal(scales, row_scales)


def in_parts(kind: type[ShardedLinear], weight: Tensor) -> tuple[Tensor, Tensor]:
    """(packed, scales) of ten rows on three ranks, one of which has none."""
    parts = [quantized_rows(kind, part) for part in (weight[:3], weight[3:3], weight[3:])]
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]).view(torch.float32).view(-1)


def held(_rank: int, _gather: Any, folder: Path, bits: int) -> int:
    model = load(folder, bits, torch.bfloat16)
    return weight_bytes(model, decoder_layers(model)).held


@pytest.mark.parametrize(("bits", "uncounted"), [(4, 0), (8, 4 * (3 * 64 + 2 * 32 + 2 * 128))])
def test_the_estimate_of_memory_is_what_a_rank_holds(bits: int, uncounted: int, tmp_path: Path) -> None:
    """In 8 bits without the scale of each row, of which a rank has those of one of the two layers."""
    folder = save(tmp_path)
    model = tiny_llama(hidden=64).to(torch.bfloat16)
    add_lora(model, rank=4)
    sizes = model_sizes(model)
    assert sizes is not None
    settings = MemorySettings(torch.bfloat16, 64, 64, world_size=2, sharded=True, bits=bits)
    for found in run_processes(2, held, folder, bits):
        assert found - memory_needs(sizes, settings).frozen_weights == uncounted


def moved(_rank: int, _gather: Any, folder: Path, bits: int) -> float:
    """How far gradients change when an example with huge activations joins the micro-batch, relative."""
    model = load(folder, bits)
    add_lora(model, rank=4, targets=("q_proj", "v_proj", "down_proj"))
    randomise_adapters(model)
    alone = gradients(model, ORDINARY)
    return relative(gradients(model, [*ORDINARY, OUTLIER])[:-1], alone)


@pytest.mark.parametrize("bits", KINDS)
def test_an_examples_gradient_does_not_depend_on_a_neighbours_outliers(bits: int, tmp_path: Path) -> None:
    model = tiny_llama(hidden=64)
    with torch.no_grad():
        own = model.get_input_embeddings().weight[HUGE]
        own.zero_()
        own[3] = 100.0  # all in one dimension: the square root of 64 behind a norm
    model.save_pretrained(tmp_path)
    assert run_processes(1, moved, tmp_path, bits)[0] < 1e-5


def refusal(_rank: int, _gather: Any, folder: Path, bits: int) -> str:
    with pytest.raises(InvalidArgument) as refused:
        load_model(str(folder), dtype=torch.float32, device=CPU, bits=bits, sharding=Sharding())
    return str(refused.value)


def test_what_cannot_be_sharded_in_few_bits_is_refused_in_one_line(tmp_path: Path) -> None:
    narrow = save_tiny(tmp_path / "narrow")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100))
    gpt2.save_pretrained(tmp_path / "gpt2")
    told = {
        (narrow, 4): "q_proj has 32 inputs, no multiple of 64",
        (tmp_path / "gpt2", 4): "is stored by columns",
        (tmp_path / "gpt2", 8): "is stored by columns",
    }
    for (folder, bits), reason in told.items():
        found = run_processes(1, refusal, folder, bits)[0]
        assert reason in found
        assert found.startswith(f"--qbits={bits}: ")
        assert "\n" not in found


def test_a_weight_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    path = save(tmp_path) / "model.safetensors"
    weights, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path)
    assert f"has no weight {name}" in run_processes(1, refusal, tmp_path, 4)[0]
    save_file(weights | {name: torch.zeros(3, 64)}, path)
    told = run_processes(1, refusal, tmp_path, 4)[0]
    assert f"files='{name}': has shape (3, 64)" in told
