"""What the launch configuration decides: processes, device, precision, and whether frozen weights are sharded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from dptune._validate import refuse
from dptune.devices import has_accelerator, has_fast_bfloat16
from dptune.ranks import Ranks
from utils.cli.familiar_flags import why_missing

# How long a rank waits for another before it fails. If a process dies, the launcher ends the others sooner; this limit
# is for a machine that disappears.
RANKS_WAIT = timedelta(minutes=10)
# Gradients at hidden states are near 1e-5, and fp16 loses values below 6e-8. 2^12 leaves room on both sides.
_FP16_LOSS_SCALE = 4096.0
# Of a whole model. With 2^12, short rows of small Gemma models overflowed; with 2^8 none did, and nothing was lost.
_FP16_LOSS_SCALE_OF_WHOLE = 256.0


@dataclass(frozen=True)
class Sharding:
    """How the launch configuration shards frozen weights.

    Attributes:
        cpu_offload: keep shards in the CPU's memory, and move a layer to the GPU when it computes.
        reshard_after_forward: free a layer's gathered weights between forward and backward pass. False keeps them: it
            is faster, but every rank then holds the whole model during a micro-batch.
        checkpoint_activations: recompute activations, as `--gradient_ckpt` does.
    """

    cpu_offload: bool = False
    reshard_after_forward: bool = True
    checkpoint_activations: bool = False


def make_accelerator(**kwargs: Any) -> Accelerator:
    """The process group and device of this launch; `kwargs` go to `accelerate.Accelerator`.

    Without an accelerator this asks for the CPU explicitly; otherwise accelerate would not connect the processes.

    Raises:
        InvalidArgument: the launch asks for DeepSpeed or a compiled model.
    """
    refuse_launch()
    group = InitProcessGroupKwargs(timeout=RANKS_WAIT)
    if not has_accelerator():
        # accelerate refuses fp16 on a CPU, which then computes in float32 (`compute_dtype`).
        asked = precision_of_launch()
        kwargs = {"cpu": True, "mixed_precision": "bf16" if asked == "bf16" else "no"} | kwargs
    accelerator = Accelerator(kwargs_handlers=[group], **kwargs)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but {accelerator.num_processes} joined")
    return accelerator


def precision_of_launch(environment: Mapping[str, str] = os.environ) -> str | None:
    """`mixed_precision` of the launch configuration, whatever this machine makes of it; None without accelerate's
    launcher."""
    return environment.get("ACCELERATE_MIXED_PRECISION")


def refuse_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch configuration that asks for DeepSpeed or torch.compile, which accelerate would ignore here."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        refuse("distributed_type", "DEEPSPEED", str(why_missing("deepspeed")))
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        refuse("dynamo_backend", backend, str(why_missing("torch_compile")))


def ranks_of(accelerator: Accelerator) -> Ranks:
    """The processes of this launch, as the engine takes them."""
    if accelerator.num_processes == 1:
        return Ranks()
    return Ranks(
        accelerator.process_index,
        accelerator.num_processes,
        gather=accelerator.gather,
        reduce=accelerator.reduce,
        broadcast=lambda value: broadcast_object_list([value])[0],
    )


def compute_dtype(mixed_precision: str, device: torch.device | str) -> torch.dtype:
    """The base model's dtype: the launch's `mixed_precision`. A CPU takes float32 unless it multiplies bf16 faster."""
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if mixed_precision == "bf16" and has_fast_bfloat16() else torch.float32
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in dtypes:
        refuse("mixed_precision", mixed_precision, f"set it to one of {', '.join(dtypes)} in the launch configuration")
    return dtypes[mixed_precision]


def describe_precision(dtype: torch.dtype, device: torch.device) -> list[str]:
    """A line for the user of a CPU that computes in bfloat16; empty otherwise."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return []
    return [
        "precision              bfloat16, which this processor multiplies faster (--mixed_precision no for float32)"
    ]


def loss_scale(dtype: torch.dtype, *, whole: bool = False) -> float:
    """The factor for losses before a backward pass that computes in `dtype`.

    Args:
        dtype: what the model computes in.
        whole: whether the model's own parameters are trained, not adapters.
    """
    if dtype != torch.float16:
        return 1.0
    return _FP16_LOSS_SCALE_OF_WHOLE if whole else _FP16_LOSS_SCALE


def sharding_of_launch(environment: Mapping[str, str] = os.environ) -> Sharding | None:
    """The sharding that the launch configuration asks for (`distributed_type: FSDP`), None if it asks for none.

    Read from the launcher's environment variables, because accelerate silently ignores FSDP on a CPU.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    return Sharding(
        cpu_offload=_flag(environment, "FSDP_OFFLOAD_PARAMS", default=False),
        reshard_after_forward=_flag(environment, "FSDP_RESHARD_AFTER_FORWARD", default=True),
        checkpoint_activations=_flag(environment, "FSDP_ACTIVATION_CHECKPOINTING", default=False),
    )


def _flag(environment: Mapping[str, str], name: str, *, default: bool) -> bool:
    value = environment.get(name, str(default)).lower()
    if value not in ("true", "false"):  # FSDP1 has other values here, such as FULL_SHARD
        refuse(name.lower(), value, "give true or false in the launch configuration, with fsdp_version: 2")
    return value == "true"
