"""Refuses settings of transformers' Trainer that would break the guarantee or the engine, and says what to change."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dptune._validate import Described, refuse
from dptune.lora import trainable_parameters
from dptune.sharding import are_sharded

if TYPE_CHECKING:
    from transformers import TrainingArguments


class _Rule(NamedTuple):
    """An argument, whether a value of it breaks something, and the remedy."""

    name: str
    breaks: Callable[[Any], bool]
    remedy: str


_RULES = (
    _Rule(
        "max_grad_norm",
        lambda value: value != 0,
        "it clips the sum of a batch, which bounds no single contribution; give 0 and --per_sample_max_grad_norm",
    ),
    _Rule("label_smoothing_factor", bool, "its loss is a mean over the micro-batch; give 0 and smooth in losses="),
    _Rule(
        "neftune_noise_alpha",
        lambda value: value is not None,
        "its noise depends on the longest row of a micro-batch, so it couples examples; remove it",
    ),
    _Rule("fp16", bool, "its loss scale follows the data; give --bf16 or train in float32"),
    _Rule("push_to_hub", bool, "checkpoints hold losses, which are not private; upload the model by hand"),
    _Rule("auto_find_batch_size", bool, "it repeats steps that were already released; set the batch size by hand"),
    _Rule("torch_compile", bool, "hooks on layers do not run in a compiled model; remove it"),
    _Rule("use_liger_kernel", bool, "its fused layers have no per-example gradients; remove it"),
    _Rule("fsdp", bool, "it averages gradients before they are clipped; use train_clm.py, which shards"),
    _Rule("deepspeed", bool, "it averages gradients before they are clipped; remove it"),
    _Rule("parallelism_config", lambda value: value is not None, "only data parallelism is supported; remove it"),
    _Rule(
        "include_num_input_tokens_seen",
        lambda value: value not in (False, "no", None),
        "it would publish the number of tokens in secret draws; remove it",
    ),
    _Rule(
        "train_sampling_strategy",
        lambda value: value != "random",
        "batches must be Poisson draws; remove it",
    ),
    _Rule("n_gpu", lambda value: value > 1, "each process must use one device; launch with torchrun"),
    _Rule(
        "optim",
        lambda value: any(word in str(getattr(value, "value", value)) for word in ("lomo", "layerwise")),
        "it updates weights during the backward pass, before noise is added; use adamw_torch",
    ),
)
_FLOAT32_BYTES = 4
_DEFAULTS = {"train_sampling_strategy": "random", "n_gpu": 1, "max_grad_norm": 1.0}


def rounds_by_shape(model: nn.Module, args: TrainingArguments) -> bool:
    """Whether the model may compute in less than float32, where a row's rounding shows the shape of its micro-batch.

    A Trainer's collator makes micro-batches as wide as their longest row. In float32 the difference is within the
    noise's margin for rounding (`dptune.mechanism.ROUNDING`).
    """
    exact = (torch.float32, torch.float64)
    return bool(
        args.bf16
        or args.fp16
        or getattr(args, "tf32", None)
        or {_products(backend) for backend in (torch.backends.cuda, torch.backends.mkldnn)} - {"none", "ieee"}
        or torch.is_autocast_enabled(args.device.type)
        or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
        or any(parameter.dtype not in exact for parameter in model.parameters())
    )


def _products(backend: Any) -> str:
    """How a backend multiplies float32 matrices: "ieee", "tf32" or "bf16"; "none" is its default, "ieee"."""
    return str(backend.matmul.fp32_precision)


class LessThanFloat32(TorchDispatchMode):
    """Notes whether an operation under it gives numbers of less than float32, as within `torch.autocast`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < _FLOAT32_BYTES:
                self.seen = True
        return out


def refuse_sharded_training(model: nn.Module | None) -> None:
    """Refuse a model whose trained weights are sharded: transformers' Trainer cannot save or resume them.

    Raises:
        InvalidArgument: the trained weights are sharded.
    """
    if model is not None and are_sharded(trainable_parameters(model)):
        refuse("model", Described(type(model).__name__), "its trained weights are sharded; train it with train_clm.py")


def refuse_unsafe_arguments(args: TrainingArguments) -> None:
    """Refuse transformers' `TrainingArguments` if a value breaks the guarantee.

    Raises:
        InvalidArgument: the name of the argument, its value and the remedy.
    """
    for name, breaks, remedy in _RULES:
        value = getattr(args, name, _DEFAULTS.get(name))
        if breaks(value):
            refuse(f"--{name}", value, remedy)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        # Without a GPU each process believes that it is the only one: all would train and write the same run.
        remedy = f"{launched} processes were launched, but transformers sees {args.world_size}; give --use_cpu"
        refuse("--use_cpu", args.use_cpu, remedy)
