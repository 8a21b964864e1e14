"""The memory estimate agrees with allocated bytes, and says what fits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from benchmarks.allocations import allocated, micro_batch_memory, private_step
from dptune import CausalLMLoss, GaussianNoise, InvalidArgument, add_lora, noise, trainable_parameters
from dptune.averaging import Averaging
from dptune.iterate_average import IterateAverage
from utils.models.loading import checkpoint_activations
from utils.models.memory import (
    RESERVE,
    MemoryNeeds,
    MemorySettings,
    describe_memory,
    device_memory,
    fits,
    keeps_whole_sum,
    largest_budget,
    memory_needs,
    micro_batch_needs,
)
from utils.models.sizes import ModelSizes, model_sizes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
GIB = 1 << 30


def build(
    config: Any, *, dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = ATTENTION, device: str = "cpu"
) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    add_lora(model, rank=8, targets=targets)
    return model.train()


def sizes_of(model: Any) -> ModelSizes:
    sizes = model_sizes(model)
    assert sizes is not None
    return sizes


MANY = 1e6  # so many rows are expected that every micro-batch fills its budget


def large(**changes: Any) -> ModelSizes:
    """A Llama 70B with adapters, on the meta device."""
    return sizes_of(build(LlamaConfig(**{**LLAMA_70B, **changes}), dtype=torch.bfloat16, device="meta"))


def settings(**changes: Any) -> MemorySettings:
    return replace(MemorySettings(torch.bfloat16, token_budget=2048, block_size=512, drawn=MANY), **changes)


def transient(needs: MemoryNeeds) -> int:
    """The peak over what is always held."""
    return needs.total - needs.frozen_weights - needs.gathered_weights - needs.adapters


CASES = {
    "grouped queries": (LlamaConfig(**SHAPE), ATTENTION, 2, 256),
    "all heads, wide vocabulary": (
        LlamaConfig(**{**SHAPE, "num_key_value_heads": 8, "vocab_size": 6000}),
        ATTENTION,
        2,
        256,
    ),
    "adapters in the MLP too": (LlamaConfig(**SHAPE), ATTENTION + MLP, 2, 256),
    "wide MLP, one adapter": (LlamaConfig(**{**SHAPE, "intermediate_size": 1024}), ("q_proj",), 2, 256),
    "norms of queries and keys": (Qwen3Config(**SHAPE, head_dim=16), ATTENTION, 2, 256),
    "LayerNorm and written-out GELU": (
        GPT2Config(n_embd=128, n_layer=6, n_head=8, vocab_size=500, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        ("c_attn", "attn.c_proj"),
        2,
        256,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_activations_and_peak_are_as_allocated(case, dtype, checkpointing):
    config, targets, examples, tokens = CASES[case]
    model = build(config, dtype=dtype, targets=targets)
    if checkpointing:
        checkpoint_activations(model)
    measured = micro_batch_memory(model, examples, tokens)
    given = MemorySettings(dtype, examples * tokens, tokens, checkpointing=checkpointing, chunk_tokens=64)
    needs = micro_batch_needs(sizes_of(model), given, examples, examples * tokens)
    assert 0.85 < (needs.activations + needs.adapter_activations) / measured.kept < 1.15
    # An estimate that is too low ends in a crash: the peak may be over by more than it may be under.
    assert 0.95 < transient(needs) / measured.peak < 1.3
    assert (needs.adapter_activations == 0) == checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_keeps_scores_is_counted(dtype):
    config = Gemma2Config(**{**SHAPE, "num_hidden_layers": 3}, head_dim=16)
    measured = micro_batch_memory(build(config, dtype=dtype), 2, 256)
    needs = memory_needs(sizes_of(build(config, dtype=dtype)), MemorySettings(dtype, 512, 256, drawn=MANY))
    assert 0.85 < (needs.activations + needs.adapter_activations) / measured.kept < 1.15


def test_many_short_examples_make_per_example_gradients_the_peak():
    model = build(LlamaConfig(**SHAPE))
    checkpoint_activations(model)
    measured = micro_batch_memory(model, 128, 4)
    needs = memory_needs(sizes_of(model), MemorySettings(torch.float32, 512, 4, True, drawn=MANY))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert needs.per_example_gradients == 128 * 4 * trained
    assert 0.95 < transient(needs) / measured.peak < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_output_layer_keeps_more_of_each_logit(dtype):
    config = LlamaConfig(**{**SHAPE, "vocab_size": 20_000, "num_hidden_layers": 2})
    model = build(config, dtype=dtype, targets=(*ATTENTION, "lm_head"))
    measured = micro_batch_memory(model, 2, 128)
    needs = memory_needs(sizes_of(model), MemorySettings(dtype, 256, 128, drawn=MANY))
    assert 0.9 < transient(needs) / measured.peak < 1.3


def test_adapters_take_five_copies_in_a_step_four_between_steps_and_one_more_at_the_end_of_a_step(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    ids = torch.randint(1, 500, (1, 4))

    def first_step() -> tuple[Any, Any]:
        add_lora(model, rank=64, targets=ATTENTION)
        optimizer, step = torch.optim.AdamW(trainable_parameters(model)), private_step(model, tmp_path)
        losses = CausalLMLoss(model)
        with step:
            step.backward(losses(ids, ids))
            step.finish()
        optimizer.step()
        return optimizer, step

    (optimizer, step), held = allocated(first_step)
    needs = memory_needs(sizes_of(model), MemorySettings(torch.float32, 4, 4))
    copy = needs.adapters / 5
    assert held.left == pytest.approx(4 * copy, rel=0.02)
    step.noise = GaussianNoise(step.noise.size)  # leaving the step has closed the first

    def finish() -> None:
        step.finish()
        optimizer.step()

    _, begun = allocated(step._begun)
    _, end = allocated(finish)
    step.noise.close()
    assert begun.left == pytest.approx(copy, rel=0.02), "the sum takes two copies, and the last gradient is gone"
    # The noise is made on the CPU by another thread. On its way to the sum a slice of it is copied, never the whole.
    assert end.peak < 1.2 * needs.finish + 8 * noise._AT_ONCE
    assert needs.finish == copy


def test_an_average_of_the_weights_is_one_more_copy():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    add_lora(model, rank=64, targets=ATTENTION)
    average = IterateAverage(model, Averaging(ema=0.9), 3)
    _, held = allocated(lambda: average.add(1))
    without, with_it = (
        memory_needs(sizes_of(model), MemorySettings(torch.float32, 4, 4, keeps_average=kept)) for kept in (False, True)
    )
    assert with_it.adapters - without.adapters == with_it.total - without.total == held.left


def test_allocations_are_seen_and_so_is_what_is_freed():
    def work() -> torch.Tensor:
        torch.zeros(5 << 20, dtype=torch.uint8).neg_()
        return torch.ones(1 << 20).neg_()

    kept, seen = allocated(work)
    assert kept.shape == (1 << 20,)
    assert 4 << 20 <= seen.left < (4 << 20) + 4096
    assert 5 << 20 <= seen.peak < (5 << 20) + 4096
    # What an operation needs inside itself counts too: a sum of bytes is taken over 64-bit copies of them.
    _, inside = allocated(lambda: torch.zeros(1 << 20, dtype=torch.uint8).sum().item())
    assert inside.left == 0
    assert 9 << 20 <= inside.peak < (9 << 20) + 4096


def test_sizes_are_counted_without_weights_and_with_tied_ones_once():
    sizes = large()
    assert sizes.frozen == 68_976_648_192  # the parameters of Llama 2 70B
    assert sizes.root == 2 * 32000 * 8192 + 8192
    assert sizes.layer * 80 + sizes.root == sizes.frozen
    assert sizes.trained == 80 * 8 * (2 * (8192 + 8192) + 2 * (8192 + 1024))  # rank 8 on q and o, on k and v
    assert large(tie_word_embeddings=True).root == 32000 * 8192 + 8192


def test_a_quantised_base_is_counted_by_its_bits():
    sizes = large()
    held = {bits: memory_needs(sizes, settings(bits=bits)).frozen_weights for bits in (4, 8, 16)}
    assert held[16] == 2 * sizes.frozen
    linear = 80 * sizes.linear
    assert held[8] == 2 * (sizes.frozen - linear) + linear
    assert held[4] == 2 * (sizes.frozen - linear) + linear * 9 // 16  # half a byte, and 4 for 64 weights
    assert memory_needs(sizes, settings(bits=4)).gathered_weights == 2 * 8192 * 28672


def test_sharding_divides_what_is_held_and_gathers_three_layers_and_the_root():
    sizes = large()
    whole, sharded = memory_needs(sizes, settings()), memory_needs(sizes, settings(sharded=True, world_size=8))
    assert whole.gathered_weights == 0
    assert sharded.frozen_weights == whole.frozen_weights // 8
    assert sharded.gathered_weights == 2 * (3 * sizes.layer + sizes.root)
    assert sharded.activations == whole.activations
    offloaded = memory_needs(sizes, settings(sharded=True, offload=True, world_size=8))
    assert offloaded.frozen_weights == 0
    assert offloaded.host - sharded.host == sharded.frozen_weights
    assert memory_needs(sizes, settings(world_size=8)).frozen_weights == whole.frozen_weights  # each holds all
    kept = memory_needs(sizes, settings(sharded=True, world_size=8, reshard=False))
    assert kept.gathered_weights == whole.frozen_weights


def test_few_bits_are_divided_too_and_gathered_packed():
    sizes = large()
    for bits in (4, 8):
        whole, halved = (
            memory_needs(sizes, settings(bits=bits, sharded=ranks > 1, world_size=ranks)) for ranks in (1, 2)
        )
        assert halved.frozen_weights == whole.frozen_weights // 2
        layers = (whole.frozen_weights - 2 * sizes.root) // 80
        assert halved.gathered_weights == 3 * layers + 2 * sizes.root + 2 * 8192 * 28672  # and one dequantised


def test_a_model_of_70b_in_four_bits_fits_on_two_cards_of_24_gib():
    chosen = settings(bits=4, sharded=True, world_size=2, checkpointing=True, token_budget=512)
    told = describe_memory(partial(memory_needs, large()), chosen, 24 * GIB)
    assert "about 22.68 GiB" in told[0]
    assert "frozen weights 18.42 GiB, gathered weights 2.76 GiB" in told[1]
    assert "fits: the device has 24.00 GiB" in told[-1]


def test_one_rank_exchanges_nothing_and_many_no_more_than_the_bound():
    sizes = large()
    alone, many = (memory_needs(sizes, settings(world_size=count)).finish for count in (1, 64))
    assert alone == 4 * sizes.trained
    assert many == alone + (64 << 20) + (4 << 20)


def test_tokens_are_at_least_one_whole_example():
    sizes = large()
    long, budget = (memory_needs(sizes, settings(token_budget=tokens, block_size=4096)) for tokens in (64, 4096))
    assert long.activations == budget.activations


def test_few_expected_rows_need_no_more_than_one_at_a_time():
    """Micro-batches of a small logical batch hold one row, whatever the budget allows."""
    one, many = (memory_needs(large(), settings(drawn=drawn)) for drawn in (1.0, MANY))
    assert many.activations == 4 * one.activations


def test_authors_are_never_split():
    alone, author = (memory_needs(large(), settings(drawn=1.0, rows_per_item=k)) for k in (1, 8))
    assert author.activations == 8 * alone.activations


def test_the_views_of_an_example_are_never_split():
    alone, views = (memory_needs(large(), settings(drawn=1.0, views=k)) for k in (1, 8))
    assert views.activations == 8 * alone.activations


def test_lines_name_the_parts_and_what_fits():
    lines = describe_memory(partial(memory_needs, large()), settings(sharded=True, world_size=16), 80 * GIB)
    assert lines[0].startswith("memory per device      about ")
    assert "at most 2,048 tokens at a time" in lines[0]
    assert "frozen weights 8.03 GiB" in lines[1]
    assert "fits: the device has 80.00 GiB" in lines[-1]
    assert not any("fit" in line for line in describe_memory(partial(memory_needs, large()), settings(), None))
    assert any(
        line.startswith("memory of the CPU")
        for line in describe_memory(partial(memory_needs, large()), settings(sharded=True, offload=True), None)
    )


def advice(sizes: ModelSizes, available: int, **changes: Any) -> str:
    line = describe_memory(partial(memory_needs, sizes), settings(**changes), available)[-1]
    assert "does not fit: needs " in line
    return line.partition("; ")[2]


def test_advice_is_what_fits_and_no_more():
    sizes = sizes_of(build(LlamaConfig(**{**LLAMA_70B, "num_hidden_layers": 16}), dtype=torch.bfloat16, device="meta"))
    needs = memory_needs(sizes, settings())
    text = advice(sizes, needs.total - GIB)
    assert "--gradient_ckpt (" in text
    checkpointed = memory_needs(sizes, settings(checkpointing=True)).total
    assert f"{checkpointed / GIB:.2f} GiB" in text
    budget = int(text.split("--max_tokens_per_device ")[1].split()[0])
    fitting, more = (memory_needs(sizes, settings(token_budget=tokens)) for tokens in (budget, budget + 64))
    assert fits(fitting, needs.total - GIB)
    assert not fits(more, needs.total - GIB)
    assert "2 GPUs with accelerate_configs/accelerate_config.cfg" in text


def llama_7b() -> ModelSizes:
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    return sizes_of(build(LlamaConfig(**shape, **heads), dtype=torch.bfloat16, device="meta"))


def test_frozen_weights_take_half_in_16_bits_and_adapters_the_same():
    exact, half = (
        memory_needs(llama_7b(), settings(dtype=dtype, token_budget=512)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.frozen_weights == 2 * half.frozen_weights == 4 * 6_738_415_616  # the parameters of Llama 2 7B
    assert exact.adapters == half.adapters
    assert memory_needs(llama_7b(), settings(dtype=torch.float16, token_budget=512)) == half


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True, "bits": 4}, {"sharded": True, "world_size": 8}])
def test_the_largest_budget_fits_and_64_tokens_more_do_not(changes):
    needs_with = partial(memory_needs, llama_7b())
    largest = largest_budget(needs_with, settings(**changes), 24 * GIB)
    assert largest is not None
    assert largest % 64 == 0
    fitting, more = (needs_with(settings(**changes, token_budget=tokens)) for tokens in (largest, largest + 64))
    assert fits(fitting, 24 * GIB)
    assert not fits(more, 24 * GIB)
    told = describe_memory(needs_with, settings(**changes), 24 * GIB)[-1]
    assert told.endswith(f"--max_tokens_per_device may be up to {largest}")


def test_the_largest_budget_is_the_given_one_where_no_larger_fits():
    needs_with = partial(memory_needs, llama_7b())
    given = settings(token_budget=2050)
    room = needs_with(given).total + RESERVE
    assert largest_budget(needs_with, given, room) == 2050


def test_any_budget_fits_where_a_step_draws_few_rows():
    few, needs_with = settings(drawn=4.0), partial(memory_needs, llama_7b())
    assert largest_budget(needs_with, few, 80 * GIB) is None
    most = max(tokens for _, tokens in replace(few, token_budget=1 << 30).micro_batches)
    assert f"a forward pass of this batch has at most {most:,} tokens" in describe_memory(needs_with, few, 80 * GIB)[-1]


def test_advice_has_fewer_bits_and_half_precision_where_they_fit():
    sizes = llama_7b()
    text = advice(sizes, 12 * GIB, token_budget=512)
    assert f"--qbits 4 ({memory_needs(sizes, settings(bits=4, token_budget=512)).total / GIB:.2f} GiB)" in text
    assert "mixed_precision" not in text
    exact = advice(sizes, 24 * GIB, token_budget=512, dtype=torch.float32)
    needs = memory_needs(sizes, settings(token_budget=512)).total
    assert f"mixed_precision bf16 (or fp16) in the launch configuration ({needs / GIB:.2f} GiB)" in exact
    both = advice(sizes, 13 * GIB // 2, token_budget=2048)
    assert both.startswith("try --gradient_ckpt --qbits 4 (")
    assert "--qbits" not in advice(sizes, 4 * GIB, token_budget=2048, bits=4)


def test_advice_joins_changes_where_one_is_not_enough():
    sizes = large()
    text = advice(sizes, 24 * GIB)
    assert text.startswith("try --gradient_ckpt on ")
    count = int(text.split(" on ")[1].split()[0])
    less, enough = (
        memory_needs(sizes, settings(checkpointing=True, sharded=True, world_size=ranks))
        for ranks in (count // 2, count)
    )
    assert fits(enough, 24 * GIB)
    assert not fits(less, 24 * GIB)
    alone = memory_needs(sizes, settings(sharded=True, world_size=1024))
    assert not fits(alone, 24 * GIB)
    assert "--gradient_ckpt" not in advice(sizes, 24 * GIB, checkpointing=True)
    assert "use a smaller model or --block_size" in advice(sizes, GIB)


def test_advice_keeps_the_devices_that_are_used():
    sizes = sizes_of(build(LlamaConfig(**{**LLAMA_70B, "num_hidden_layers": 16}), dtype=torch.bfloat16, device="meta"))
    room = memory_needs(sizes, settings(sharded=True, world_size=2)).total + RESERVE
    assert "or 2 GPUs with" in advice(sizes, room)
    assert "or 8 GPUs with" in advice(sizes, room, world_size=8)  # each held all; sharded over the same 8, it fits


def test_advice_shortens_the_pass_last():
    sizes = large()
    one_example = settings(checkpointing=True, sharded=True, world_size=1024, token_budget=512)
    enough = memory_needs(sizes, one_example).total + RESERVE
    text = advice(sizes, enough, sharded=True, world_size=2, token_budget=65536)
    assert text.startswith("try --gradient_ckpt --max_tokens_per_device 512 on 1024 GPUs")


def test_a_devices_memory_is_that_of_a_gpu_only(monkeypatch):
    assert device_memory(torch.device("cpu")) is None
    left = {torch.device("cuda", 0): 7 * GIB, torch.device("xpu", 1): 5 * GIB}
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (left[device], 8 * GIB))
    for device, expected in left.items():
        assert device_memory(device) == expected

    def unknown(_: torch.device) -> tuple[int, int]:
        raise NotImplementedError

    monkeypatch.setattr(torch.accelerator, "get_memory_info", unknown)
    assert device_memory(torch.device("mps")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_budget": 0}, "token_budget=0"),
        ({"world_size": 0}, "world_size=0"),
        ({"bits": 3}, "bits=3: give one of 4, 8, 16"),
        ({"offload": True}, "offload=True: only shards"),
    ],
)
def test_mistakes_are_refused(changes, message):
    with pytest.raises(InvalidArgument, match=message):
        settings(**changes)


def test_a_whole_sum_may_take_a_quarter_of_the_free_memory():
    """It is in float64: 8 bytes for each trained value of the whole model."""
    assert keeps_whole_sum(1 << 28, 8 * GIB)
    assert not keeps_whole_sum((1 << 28) + 1, 8 * GIB)
    assert not keeps_whole_sum(1, None)
