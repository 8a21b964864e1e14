"""A run's model without its weights: prepared as it will be trained, and the memory that its training needs."""

from __future__ import annotations

from typing import Any

from dptune.run.plan import RunPlan
from dptune.shapes import Shapes
from utils.cli.launch import sharding_of_launch
from utils.models.loading import load_skeleton, require_context
from utils.models.memory import MemorySettings
from utils.models.trainable import prepare_trainable
from utils.training.arguments import Groups
from utils.training.optimizers import require_works
from utils.training.plan import describe_model, describe_most_passes
from utils.training.target import Target
from utils.training.views import require_different_views


def prepared_skeleton(groups: Groups, target: Target) -> tuple[Any, list[str]]:
    """(the model without its weights, with adapters or its own trained parameters; the names of the trained ones).

    It finds a wrong target before gigabytes are read.

    Raises:
        InvalidArgument: no such model, or flags that do not fit it, its context or the devices.
    """
    model, dtype, private = groups.model, target.dtype, groups.privacy.is_private
    attention = model.attn_implementation
    skeleton = load_skeleton(model.model_name_or_path, **model.hub, attention=attention, dtype=dtype)
    require_context(skeleton, groups.data.block_size)
    names = prepare_trainable(skeleton, groups.lora, bits=model.qbits, dtype=dtype, private=private)
    require_different_views(groups.views, skeleton)
    require_works(groups.optimization.optimizer, target.device, sharded=shards_whole_model(groups))
    return skeleton, names


def token_budget_of(groups: Groups) -> int:
    """The tokens of one forward pass that the flags ask for."""
    optimization = groups.optimization
    return optimization.max_tokens_per_device or optimization.per_device_train_batch_size * groups.data.block_size


def memory_settings(groups: Groups, target: Target, drawn: float, token_budget: int | None = None) -> MemorySettings:
    """What the memory of a run depends on besides the model.

    Args:
        groups: the flags.
        target: the devices.
        drawn: the number of rows that a step draws on average, over all processes.
        token_budget: tokens in one forward pass; None for what the flags ask for.
    """
    sharding = sharding_of_launch()
    return MemorySettings(
        target.dtype,
        token_budget or token_budget_of(groups),
        groups.data.block_size,
        recomputes(groups),
        target.processes,
        sharded=sharding is not None,
        offload=sharding is not None and sharding.cpu_offload,
        reshard=sharding is None or sharding.reshard_after_forward,
        bits=groups.model.qbits,
        drawn=drawn / target.processes,
        overhead=target.overhead(sharded=sharding is not None),
        rows_per_item=groups.privacy.unit.rows_at_once,
        keeps_average=groups.optimization.averaging.is_on,
        views=groups.views.views,
    )


def describe_memory_of(
    skeleton: Any, groups: Groups, target: Target, plan: RunPlan, token_budget: int | None = None
) -> list[str]:
    """Printed lines: the devices, the bound on forward passes, the number of parameters, the estimate of memory.

    Args:
        skeleton: see `prepared_skeleton`.
        groups: the flags.
        target: the devices.
        plan: for the number of rows that a step draws.
        token_budget: see `memory_settings`.
    """
    needed = memory_settings(groups, target, plan.expected_batch_size, token_budget)
    shapes = Shapes(
        needed.block_size,
        needed.token_budget,
        needed.drawn,
        masked=False,
        overhead=needed.overhead,
        views=needed.views,
    )
    return [
        *target.describe(sharded=needed.sharded),
        *describe_most_passes(plan, shapes, ranks=target.processes, rows_per_item=needed.rows_per_item),
        *describe_model(skeleton, needed, target.memory),
    ]


def recomputes(groups: Groups) -> bool:
    """Whether activations are recomputed in the backward pass instead of stored."""
    sharding = sharding_of_launch()
    return groups.optimization.gradient_ckpt or (sharding is not None and sharding.checkpoint_activations)


def shards_whole_model(groups: Groups) -> bool:
    """Whether each rank holds only its shard of the trained weights."""
    return sharding_of_launch() is not None and bool(groups.lora.trainable)
