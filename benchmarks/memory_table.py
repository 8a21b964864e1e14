"""Memory per GPU of Llama 7B, 13B and 70B, as Markdown, computed by `utils/models/memory.py`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.models import TARGETS
from benchmarks.tables import markdown
from dptune import add_lora
from dptune._validate import present
from utils.models.memory import MemoryNeeds, MemorySettings, Needs, fits, memory_needs
from utils.models.sizes import ModelSizes, model_sizes
from utils.models.whole_memory import WholeSizes, memory_of_whole, whole_sizes

RANK = 16
GPUS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (512, 2048)
CARDS = (24, 48, 80)  # GiB
FEW_BITS = (4, 8)

# Llama 2 (Touvron et al. 2023), as in the published config.json files; 7B and 13B have as many keys as queries.
LLAMAS: dict[str, dict[str, Any]] = {
    "Llama 7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama 13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "Llama 70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
_PARTS = {
    "activations": "activations of the base",
    "adapter_activations": "activations of the adapters",
    "one_layer": "one layer in backward",
    "per_example_gradients": "per-example gradients",
    "logits": "logits, one chunk",
    "adapters": "adapters and Adam",
    "finish": "end of a step",
}


@cache
def llama_sizes(name: str) -> ModelSizes:
    """Sizes of a key of `LLAMAS` with adapters on q, k, v and o, computed without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMAS[name], vocab_size=32000), dtype=torch.bfloat16)
    add_lora(model, rank=RANK, targets=TARGETS)
    return present(model_sizes(model), f"size of {name}")


def needs_of(name: str, *, gpus: int, tokens: int, checkpointing: bool, bits: int = 16) -> MemoryNeeds:
    """Needs in bf16 with one example of `tokens` at a time, sharded if there is more than one GPU."""
    settings = MemorySettings(
        torch.bfloat16, tokens, tokens, checkpointing=checkpointing, world_size=gpus, sharded=gpus > 1, bits=bits
    )
    return memory_needs(llama_sizes(name), settings)


def scaling_table(name: str, bits: int = 16) -> str:
    """One row per number of GPUs: peak GiB, and the smallest card that is large enough."""
    settings = [(tokens, checkpointing) for tokens in TOKENS for checkpointing in (False, True)]
    header = ["GPUs", "weights held", "gathered"]
    header += [f"{tokens:,} tokens{', checkpointing' if checkpointing else ''}" for tokens, checkpointing in settings]
    rows = []
    for gpus in GPUS:
        needs = [needs_of(name, gpus=gpus, tokens=t, checkpointing=c, bits=bits) for t, c in settings]
        held = [gib(needs[0].frozen_weights), gib(needs[0].gathered_weights)]
        rows.append([str(gpus), *held, *(f"{gib(one.total)} ({card(one)})" for one in needs)])
    return markdown(header, rows)


@cache
def whole_llama_sizes(name: str) -> WholeSizes:
    """Sizes of a key of `LLAMAS` with every parameter trained, computed without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMAS[name], vocab_size=32000), dtype=torch.float32)
    return present(whole_sizes(model), f"size of {name}")


def whole_table(name: str) -> str:
    """One row per number of GPUs: what a rank holds throughout, and the peak GiB with the card that is large enough."""
    settings = [(tokens, checkpointing) for tokens in TOKENS for checkpointing in (False, True)]
    header = ["GPUs", "weights, moments, sum", "gathered"]
    header += [f"{tokens:,} tokens{', checkpointing' if checkpointing else ''}" for tokens, checkpointing in settings]
    rows = []
    for gpus in GPUS:
        needs = []
        for tokens, checkpointing in settings:
            how = MemorySettings(
                torch.bfloat16, tokens, tokens, checkpointing=checkpointing, world_size=gpus, sharded=gpus > 1
            )
            needs.append(memory_of_whole(whole_llama_sizes(name), how))
        held = [gib(needs[0].weights + needs[0].summed), gib(needs[0].gathered)]
        rows.append([str(gpus), *held, *(f"{gib(one.total)} ({card(one)})" for one in needs)])
    return markdown(header, rows)


def parts_table() -> str:
    """The parts that do not depend on the number of GPUs, one row per part."""
    header = ["one example", *(f"{name}, {tokens:,}" for name in LLAMAS for tokens in TOKENS)]
    rows = []
    for attribute, label in _PARTS.items():
        for checkpointing in (False, True) if attribute in ("activations", "one_layer") else (False,):
            cells = [
                getattr(needs_of(name, gpus=2, tokens=tokens, checkpointing=checkpointing), attribute)
                for name in LLAMAS
                for tokens in TOKENS
            ]
            rows.append([f"{label}{', checkpointing' if checkpointing else ''}", *map(gib, cells)])
    return markdown(header, rows)


def on_paper() -> str:
    """The whole section."""
    cards = ", ".join(map(str, CARDS))
    parts = [
        "## On paper: what a GPU must hold",
        f"Peak GiB per GPU of a private step in bf16 with AdamW, adapters of rank {RANK} on q, k, v and o, one example "
        f"at a time. In brackets: the smallest card of {cards} GiB that is large enough, with 1 GiB left for CUDA's "
        "libraries (-: none). With 2 or more GPUs the frozen weights are sharded; a GPU then also holds three gathered "
        "decoder layers and the root group (embeddings, output layer). Computed, not measured on GPUs.",
    ]
    for name in LLAMAS:
        parts += [f"### {name}", scaling_table(name)]
    for bits in FEW_BITS:
        for name in LLAMAS:
            parts += [f"### {name} with `--qbits {bits}`", scaling_table(name, bits)]
    parts += [
        "## On paper: every parameter trained",
        "As above, with `--trainable all`: weights in float32 with AdamW's moments, and the sum in float64, all "
        "sharded. A rank sends each micro-batch's sum. Computed, not measured on GPUs.",
    ]
    for name in LLAMAS:
        parts += [f"### {name}, whole", whole_table(name)]
    parts += ["### Parts, for any number of GPUs (GiB; they do not peak at the same time)", parts_table()]
    return "\n\n".join(parts)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f}"


def card(needs: Needs) -> str:
    """The smallest of `CARDS` that is large enough."""
    return next((str(size) for size in CARDS if fits(needs, size << 30)), "-")
