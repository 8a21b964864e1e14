"""Settings of transformers' Trainer that would break the guarantee or the engine, each refused with what to change."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from dptune._validate import refuse


class _Rule(NamedTuple):
    """An argument, whether a value of it is in the way, and what to do."""

    name: str
    breaks: Callable[[Any], bool]
    remedy: str


_RULES = (
    _Rule(
        "max_grad_norm",
        lambda value: value != 0,
        "it clips the sum of a batch, which bounds nobody's contribution; give 0 and --per_sample_max_grad_norm",
    ),
    _Rule("label_smoothing_factor", bool, "its loss is a mean over the micro-batch; give 0 and smooth in losses="),
    _Rule(
        "neftune_noise_alpha",
        lambda value: value is not None,
        "its noise depends on the longest neighbour in a micro-batch; leave it out",
    ),
    _Rule("fp16", bool, "the loss scale that it adapts follows the data; give --bf16 or train in float32"),
    _Rule("push_to_hub", bool, "checkpoints hold losses, which are not private; upload the model by hand"),
    _Rule("auto_find_batch_size", bool, "it runs steps again that were released; set the batch size by hand"),
    _Rule("torch_compile", bool, "hooks on layers do not run in a compiled model; leave it out"),
    _Rule("use_liger_kernel", bool, "it replaces layers by fused ones without per-example gradients; leave it out"),
    _Rule("fsdp", bool, "gradients of sharded weights cannot be clipped an example at a time; use train_clm.py"),
    _Rule("deepspeed", bool, "it averages gradients before they are clipped; leave it out"),
    _Rule("parallelism_config", lambda value: value is not None, "only data parallelism is known; leave it out"),
    _Rule(
        "include_num_input_tokens_seen",
        lambda value: value not in (False, "no", None),
        "it counts the tokens of secret draws; leave it out",
    ),
    _Rule(
        "train_sampling_strategy",
        lambda value: value != "random",
        "batches are Poisson draws, nothing else; leave it out",
    ),
    _Rule("n_gpu", lambda value: value > 1, "one process must have one device: start with torchrun"),
    _Rule(
        "optim",
        lambda value: any(word in str(getattr(value, "value", value)) for word in ("lomo", "layerwise")),
        "it updates weights during the backward pass, before the noise; take adamw_torch",
    ),
)
_DEFAULTS = {"train_sampling_strategy": "random", "n_gpu": 1, "max_grad_norm": 1.0}


def refuse_unsafe_arguments(args: Any) -> None:
    """Refuse what in transformers' `TrainingArguments` breaks the guarantee.

    Raises:
        InvalidArgument: naming the argument, its value and the remedy.
    """
    for name, breaks, remedy in _RULES:
        value = getattr(args, name, _DEFAULTS.get(name))
        if breaks(value):
            refuse(f"--{name}", value, remedy)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        # Without a GPU each process would take itself for the only one: all would train and write the same run.
        refuse(
            "--use_cpu", args.use_cpu, f"{launched} processes were started but see {args.world_size}; give --use_cpu"
        )
