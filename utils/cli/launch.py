"""What `accelerate launch` decided: processes, device, precision, and whether frozen weights are sharded."""

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
from dptune.ranks import Ranks

# How long a rank waits for another before it gives up with an error. The launcher ends the others sooner when it sees a
# process die; this is for a machine that vanishes.
_RANKS_WAIT = timedelta(minutes=10)
# A gradient at a hidden state is near 1e-5 and fp16 loses what is below 6e-8; with 2^12 there is room both ways.
_FP16_LOSS_SCALE = 4096.0


@dataclass(frozen=True)
class Sharding:
    """How the launch configuration wants frozen weights sharded.

    Attributes:
        cpu_offload: shards stay in the CPU's memory and a layer comes to the GPU when it computes.
        reshard_after_forward: drop a layer's gathered weights between forward and backward pass; False keeps them
            (faster, and every rank then holds the model for the length of a micro-batch).
        checkpoint_activations: recompute activations, as `--gradient_ckpt` does.
    """

    cpu_offload: bool = False
    reshard_after_forward: bool = True
    checkpoint_activations: bool = False


def make_accelerator(**kwargs: Any) -> Accelerator:
    """The process group and device of this launch; `kwargs` go to `accelerate.Accelerator`.

    Without a GPU the CPU is asked for by name: accelerate would otherwise give every process a world of its own.
    """
    group = InitProcessGroupKwargs(timeout=_RANKS_WAIT)
    if not torch.cuda.is_available():
        # accelerate refuses fp16 there; a CPU computes in float32 whatever the launch says (`compute_dtype`).
        kwargs = {"cpu": True, "mixed_precision": "no"} | kwargs
    accelerator = Accelerator(kwargs_handlers=[group], **kwargs)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes launched, {accelerator.num_processes} joined")
    return accelerator


def ranks_of(accelerator: Accelerator) -> Ranks:
    """The processes of this launch, as the engine knows them."""
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
    """The base model's dtype: the launch's `mixed_precision` on a GPU, float32 on a CPU (bf16 is slower there)."""
    if torch.device(device).type == "cpu":
        return torch.float32
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in dtypes:
        refuse("mixed_precision", mixed_precision, f"set it to one of {', '.join(dtypes)} in the launch configuration")
    return dtypes[mixed_precision]


def loss_scale(dtype: torch.dtype) -> float:
    """What losses are multiplied by before the backward pass through a base of `dtype`."""
    return _FP16_LOSS_SCALE if dtype == torch.float16 else 1.0


def sharding_of_launch(environment: Mapping[str, str] = os.environ) -> Sharding | None:
    """The sharding that the launch configuration asks for (`distributed_type: FSDP`), None if it asks for none.

    Read from what the launcher leaves in the environment: on a CPU accelerate itself forgets FSDP in silence.
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
    if value not in ("true", "false"):  # FSDP1 has words here, such as FULL_SHARD
        refuse(name.lower(), value, "give true or false in the launch configuration, with fsdp_version: 2")
    return value == "true"
