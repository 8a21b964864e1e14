"""The estimate of the memory of training every parameter, compared with what tensors take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.allocations import allocated, private_step
from benchmarks.contenders import adamw
from dptune import CausalLMLoss, trainable_parameters
from dptune._validate import present
from tests.whole_models import whole_model
from utils.models.loading import checkpoint_activations
from utils.models.memory import MemorySettings
from utils.models.whole_memory import WholeSizes, bytes_sent_whole, memory_of_whole, whole_needs, whole_sizes

SHAPE: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 880,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}


def llama(**changes: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | changes), dtype=torch.float32).train()


def sizes_of(**changes: int) -> WholeSizes:
    with torch.device("meta"):
        return present(whole_sizes(llama(**changes)), "size")


def measured(folder: Path, examples: int, tokens: int, *, checkpointing: bool) -> int:
    """Peak bytes of all tensors during a step of two micro-batches, when the optimizer's state exists."""
    model, loading = allocated(llama)
    if checkpointing:
        checkpoint_activations(model)
    losses, optimizer = CausalLMLoss(model), adamw(trainable_parameters(model))
    step, making = allocated(lambda: private_step(model, folder))

    def one_step() -> None:
        ids = torch.randint(1, SHAPE["vocab_size"], (examples, tokens))
        for _ in range(2):
            step.backward(losses(ids, ids))
        step.finish()
        optimizer.step()

    with step:
        _, first = allocated(one_step)
        _, second = allocated(one_step)
    return loading.left + making.left + first.left + second.peak


@pytest.mark.parametrize(
    ("examples", "tokens", "checkpointing"), [(4, 128, False), (4, 128, True), (1, 128, False), (8, 32, False)]
)
def test_the_estimate_is_the_measured_peak(examples: int, tokens: int, checkpointing: bool, tmp_path: Path) -> None:
    settings = MemorySettings(torch.float32, examples * tokens, tokens, checkpointing=checkpointing)
    predicted = whole_needs(sizes_of(), settings, examples, examples * tokens).total
    found = measured(tmp_path, examples, tokens, checkpointing=checkpointing)
    assert found / predicted == pytest.approx(1, abs=0.12)


def test_every_rank_holds_its_part_of_weights_moments_and_sum() -> None:
    settings = MemorySettings(torch.bfloat16, 512, 512)
    alone = whole_needs(sizes_of(), settings, 1, 512)
    shared = whole_needs(sizes_of(), replace(settings, sharded=True, world_size=8), 1, 512)
    values = sum(parameter.numel() for parameter in llama().parameters())
    assert (alone.weights, alone.summed) == (12 * values, 8 * values)
    for part in ("weights", "summed", "finish"):
        assert getattr(shared, part) == -(-getattr(alone, part) // 8)
    assert alone.gathered == 0 < shared.gathered <= 4 * values
    offloaded = whole_needs(sizes_of(), replace(settings, sharded=True, world_size=8, offload=True), 1, 512)
    assert (offloaded.weights, offloaded.summed, offloaded.finish) == (0, 0, 0)
    assert offloaded.host == shared.host + shared.weights + shared.summed + shared.finish


def test_an_average_of_the_weights_is_one_more_copy_of_each_ranks_part() -> None:
    settings = MemorySettings(torch.bfloat16, 512, 512, sharded=True, world_size=4)
    without, with_it = (
        whole_needs(sizes_of(), replace(settings, keeps_average=kept), 1, 512) for kept in (False, True)
    )
    values = sum(parameter.numel() for parameter in llama().parameters())
    assert with_it.weights - without.weights == with_it.total - without.total == -(-4 * values // 4)


def test_the_largest_micro_batch_counts() -> None:
    settings = MemorySettings(torch.float32, 1024, 256, drawn=64.0)
    needs = [whole_needs(sizes_of(), settings, *size).total for size in settings.micro_batches]
    assert memory_of_whole(sizes_of(), settings).total == max(needs)


def test_what_a_rank_sends_grows_with_micro_batches_and_not_with_ranks() -> None:
    sizes = sizes_of()
    once = bytes_sent_whole(sizes, 2, 1)
    assert bytes_sent_whole(sizes, 2, 3) == pytest.approx(3 * once, abs=2)
    assert bytes_sent_whole(sizes, 1, 3) == 0
    assert bytes_sent_whole(sizes, 64, 1) < 2 * once


def test_a_model_keeps_what_is_trained() -> None:
    model = whole_model("GPT-2")
    model.transformer.wpe.weight.requires_grad_(False)
    assert whole_sizes(model) is not None
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == ["transformer.wpe.weight"]
