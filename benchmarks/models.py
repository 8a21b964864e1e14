"""The model that every contender adapts: a saved one, or a Llama shape with random weights (no network needed).

Contenders run in one process, so all of them share one copy of the frozen weights: `with_own_adapters` copies the
modules only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dptune._validate import refuse

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Llama 3.2 1B and Llama 2 7B; tiny is for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}


def load(model: str | None, shape: str | None, *, dtype: str, device: torch.device) -> Any:
    """The frozen model, on `device`.

    Args:
        model: folder of a saved model, or None.
        shape: a key of `SHAPES`, used when `model` is None: weights are random and made on the device, in `dtype`, so
            that a 7B model takes seconds and no second copy.
    """
    torch.manual_seed(0)
    if model is not None:
        loaded = _load_saved(model, DTYPES[dtype]).to(device)
    else:
        assert shape is not None
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
        with torch.device(device):
            loaded = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return loaded.requires_grad_(False)


def _load_saved(folder: str, dtype: torch.dtype) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        refuse("--model", folder, f"no model could be loaded ({reason}); make demo writes .demo/SmolLM2-135M")
    # Weights are mapped from the file and read when first used: copied, they do not count as memory of the first step.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def with_own_adapters(base: nn.Module, *, gradient_ckpt: bool) -> Any:
    """A copy of `base` that shares its weights and nothing else, in training mode, ready for adapters of its own."""
    shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    model: Any = copy.deepcopy(base, shared).train()
    if gradient_ckpt:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
