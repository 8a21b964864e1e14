"""Refuses settings of transformers' Trainer that would break the guarantee or the engine, and says what to change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dptune._validate import Described, refuse
from dptune.lora import trainable_parameters
from dptune.sharding import are_sharded, holds_shards, is_sharded, mesh_of, original_class_name, reshard

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dptune.integrations.privacy_arguments import PrivacyArguments


class _Rule(NamedTuple):
    """An argument, whether a value of it breaks something, and the remedy."""

    name: str
    breaks: Callable[[Any], bool]
    remedy: str


_RULES = (
    _Rule(
        "max_grad_norm",
        lambda value: value != 0,
        "it clips the sum of a batch, which bounds no single contribution; give 0 and --clip_norm",
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
    _Rule("fsdp", bool, "it averages gradients before they are clipped; shard the model with dptune.sharding.shard"),
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
# With trained weights that are sharded, besides.
_RULES_OF_SHARDS = (
    _Rule("load_best_model_at_end", bool, "the Trainer cannot read it into sharded weights; remove it"),
    _Rule("save_only_model", bool, "checkpoints of sharded weights hold the optimizer too; remove it"),
    _Rule(
        "save_on_each_node", bool, "all processes write one checkpoint together, on a disk that they share; remove it"
    ),
    _Rule("enable_jit_checkpoint", bool, "processes that are stopped one by one cannot save together; remove it"),
    _Rule("fp16_full_eval", bool, "it would round the trained weights themselves; remove it"),
    _Rule("bf16_full_eval", bool, "it would round the trained weights themselves; remove it"),
    _Rule(
        "accelerator_config",
        lambda value: not getattr(value, "even_batches", True),
        "all processes must evaluate the same number of batches; set even_batches to true",
    ),
)
_FLOAT32_BYTES = 4
_DEFAULTS = {"train_sampling_strategy": "random", "n_gpu": 1, "max_grad_norm": 1.0}


def _kind(model: nn.Module) -> Described:
    return Described(original_class_name(model))


def _apply(rules: Iterable[_Rule], args: TrainingArguments) -> None:
    for name, breaks, remedy in rules:
        value = getattr(args, name, _DEFAULTS.get(name))
        if breaks(value):
            refuse(f"--{name}", value, remedy)


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


def require_public_choices(
    args: TrainingArguments,
    privacy_args: PrivacyArguments,
    *,
    train_dataset: object = None,
    eval_dataset: object = None,
    callbacks: Sequence[object] = (),
) -> None:
    """Refuse a private run whose result depends on the losses of rows that nobody has called public.

    Args:
        args, privacy_args: the settings.
        train_dataset, eval_dataset: the Trainer's data sets; None if they are not known.
        callbacks: the Trainer's callbacks, as far as they are known.

    Raises:
        InvalidArgument: the best model is kept, the training may end early, or its learning rate follows the losses.
    """
    from transformers import EarlyStoppingCallback

    if privacy_args.disable_dp:
        return
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    decide: dict[str, object] = {"--load_best_model_at_end": True} if args.load_best_model_at_end else {}
    decide |= {"--lr_scheduler_type": scheduler} if scheduler == "reduce_lr_on_plateau" else {}
    if any(isinstance(one, EarlyStoppingCallback) for one in callbacks):
        decide["callbacks"] = Described(EarlyStoppingCallback.__name__)
    for name, value in decide.items():
        if eval_dataset is not None and eval_dataset is train_dataset:
            refuse(name, value, "would follow the losses of the training rows, without noise; evaluate on other rows")
        if not privacy_args.validation_is_public:
            told = "the losses of the evaluation rows have no noise"
            remedy = "give validation_is_public if they are public, or of people who are not in the training data"
            refuse(name, value, f"{told}: {remedy}")


def refuse_shards(model: nn.Module) -> None:
    """Refuse a model with sharded weights, for a Trainer that knows nothing of them.

    Raises:
        InvalidArgument: weights are sharded.
    """
    if holds_shards(model):
        refuse("model", _kind(model), "its weights are sharded, which only DPTrainer can train")


def refuse_unsafe_shards(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse sharded weights that `DPTrainer` cannot train, and arguments that do not go with sharded weights.

    Raises:
        InvalidArgument: adapters are trained, or `dptune.sharding.shard` did not shard the model over all processes, or
            the shards are not where the Trainer computes, or an argument does not fit.
    """
    if not holds_shards(model):
        return
    reshard(model)  # a layer whose shards are gathered holds other tensors
    trained, mesh = trainable_parameters(model), mesh_of(model.parameters())
    if trained and not are_sharded(trained):
        remedy = "trains adapters on sharded weights; train them with train_clm.py, or do not shard the model"
        refuse("model", _kind(model), remedy)
    if not is_sharded(model) or mesh is None or mesh.size() != args.world_size:
        refuse("model", _kind(model), "is sharded in another way; shard it over all processes with dptune.sharding")
    if (kept_on := next(model.parameters()).device.type) != args.device.type:
        remedy = f"keeps its shards on {kept_on}, which only train_clm.py trains; shard it without cpu_offload"
        refuse("model", _kind(model), remedy)
    _apply(_RULES_OF_SHARDS, args)


def refuse_unsafe_arguments(args: TrainingArguments) -> None:
    """Refuse transformers' `TrainingArguments` if a value breaks the guarantee.

    Raises:
        InvalidArgument: the name of the argument, its value and the remedy.
    """
    _apply(_RULES, args)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        # Without a GPU each process believes that it is the only one: all would train and write the same run.
        remedy = f"{launched} processes were launched, but transformers sees {args.world_size}; give --use_cpu"
        refuse("--use_cpu", args.use_cpu, remedy)
