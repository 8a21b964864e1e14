"""The model that every contender trains: a saved one, or a Llama or GPT-2 shape with random weights (no download).

Contenders run in one process. Frozen weights are shared by all of them: `own_copy` then copies only the modules.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dptune._validate import present, refuse

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 4096}
# Without dropout every contender computes the same gradient. GPT-2 ties its head to the embedding; see `peers.Opacus`.
_GPT2: dict[str, Any] = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT2_TINY = _GPT2 | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 400}

# Llama 3.2 1B and Llama 2 7B; GPT-2 small as published, with half its layers, and with an untied head. The tiny shapes
# are for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
    },
    "llama-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-7b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "gpt2-tiny": _GPT2_TINY,
    "gpt2-tiny-untied": _GPT2_TINY | {"tie_word_embeddings": False},
    "gpt2-half": _GPT2 | {"n_layer": 6},
    "gpt2-small": _GPT2,
    "gpt2-small-untied": _GPT2 | {"tie_word_embeddings": False},
}


def load(model: str | None, shape: str | None, *, dtype: str, device: torch.device) -> Any:
    """The frozen model, on `device`.

    Args:
        model: folder of a saved model, or None.
        shape: a key of `SHAPES`, used if `model` is None. Random weights are made on the device in `dtype`, so a 7B
            model takes seconds and no second copy.
    """
    torch.manual_seed(0)
    if model is not None:
        loaded = _load_saved(model, DTYPES[dtype]).to(device)
    else:
        config = AutoConfig.for_model(**SHAPES[present(shape, "shape")])
        with torch.device(device):
            loaded = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return loaded.requires_grad_(False)


def _load_saved(folder: str, dtype: torch.dtype) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        refuse("--model", folder, f"no model could be loaded ({reason}); make demo writes .demo/SmolLM2-135M")
    # Mapped weights are read from the file at first use. Copied weights do not count as memory of the first step.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def own_copy(base: nn.Module, *, share_weights: bool) -> Any:
    """A copy of `base`, with shared or copied weights."""
    shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]} if share_weights else {}
    return copy.deepcopy(base, shared)
