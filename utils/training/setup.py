"""From the flags of train_clm.py to what a run is made of: data, plan, and a model of which a part trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from dptune import CausalLMLoss
from dptune.clipping import layers_of
from dptune.run.checkpoint import TrainingState
from dptune.run.identity import refuse_other_run
from utils.cli.launch import compute_dtype, loss_scale, memory_settings, sharding_of_launch
from utils.data.load import load_training_data
from utils.data.tokenization import TokenizedDataset
from utils.models.arguments import ModelArguments
from utils.models.loading import checkpoint_activations, load_model, load_skeleton, load_tokenizer, require_context
from utils.models.memory import device_memory
from utils.models.sharded import describe_shards
from utils.models.trainable import check_rules, prepare_trainable
from utils.training.arguments import (
    ClippingArguments,
    DataArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
    PrivacyArguments,
)
from utils.training.micro_batches import remembered_budget
from utils.training.plan import RunPlan, describe_data, describe_model, describe_plan, num_sampled, plan_run
from utils.training.resume import find_saved_run, model_identity, processes_of_plan, run_identity


class Groups(NamedTuple):
    """All flags, in the order of --help."""

    model: ModelArguments
    data: DataArguments
    privacy: PrivacyArguments
    clipping: ClippingArguments
    lora: LoraArguments
    optimization: OptimizationArguments
    output: OutputArguments


GROUPS = (
    ModelArguments,
    DataArguments,
    PrivacyArguments,
    ClippingArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
)


@dataclass(frozen=True)
class Job:
    """A run that is planned and not begun.

    Attributes:
        groups: the flags.
        accelerator: of the launch.
        saved: the checkpoint that it goes on from, if there is one.
        dtype: what forward passes compute in.
        names: of all parameters that will be trained.
        tokenizer, train, held_out: the data.
        plan: sampling, noise and steps.
        processes: that the logical batch is for.
        identity: what a checkpoint of it must share.
        token_budget: padded tokens in one forward pass.
    """

    groups: Groups
    accelerator: Accelerator
    saved: TrainingState | None
    dtype: torch.dtype
    names: list[str]
    tokenizer: Any
    train: TokenizedDataset
    held_out: TokenizedDataset | None
    plan: RunPlan
    processes: int
    identity: dict[str, Any]
    token_budget: int


def plan_job(groups: Groups, accelerator: Accelerator) -> Job:
    """All that can be known before the weights are read, printed."""
    lora_args, optimization, unit = groups.lora, groups.optimization, groups.privacy.unit
    name, hub, bits = groups.model.model_name_or_path, groups.model.hub, groups.model.qbits
    saved = find_saved_run(groups.output, accelerator)
    dtype, sharding = compute_dtype(accelerator.mixed_precision, accelerator.device), sharding_of_launch()
    skeleton = load_skeleton(name, **hub)
    require_context(skeleton, groups.data.block_size)
    # A wrong target is found here, before gigabytes are read.
    names = prepare_trainable(skeleton, lora_args, sharded=sharding is not None, bits=bits, dtype=dtype)
    tokenizer = load_tokenizer(name, **hub)
    train, held_out = load_training_data(tokenizer=tokenizer, unit=unit, seed=optimization.seed, **vars(groups.data))
    processes = processes_of_plan(saved, optimization, accelerator.num_processes)
    clipping = groups.clipping.style(layers_of(names).values())
    sizes: dict[str, Any] = {"num_examples": num_sampled(unit, train), "world_size": processes}
    plan = plan_run(groups.privacy, optimization, clipping=clipping, **sizes)
    identity = {"run": run_identity(plan, train, groups.privacy, optimization.optimizer)}
    if saved is not None:
        refuse_other_run(saved.identity["run"], identity["run"])
    asked = optimization.max_tokens_per_device or optimization.per_device_train_batch_size * groups.data.block_size
    token_budget = broadcast_object_list([remembered_budget(Path(groups.output.output_dir), asked)])[0]
    accelerator.print(*describe_plan(plan), *describe_data(train, held_out), sep="\n")
    limits: dict[str, Any] = memory_settings(sharding, accelerator.num_processes, bits)
    limits |= {"block_size": groups.data.block_size, "lengths": train.lengths, "checkpointing": recomputes(groups)}
    at_once = max(token_budget, unit.rows_at_once * groups.data.block_size)
    available = device_memory(accelerator.device)
    accelerator.print(*describe_model(skeleton, at_once, dtype, available=available, **limits), sep="\n")
    return Job(
        groups, accelerator, saved, dtype, names, tokenizer, train, held_out, plan, processes, identity, token_budget
    )


def recomputes(groups: Groups) -> bool:
    """Whether activations are computed again instead of kept."""
    sharding = sharding_of_launch()
    return groups.optimization.gradient_ckpt or (sharding is not None and sharding.checkpoint_activations)


def check_neighbours(job: Job, model: Any) -> None:
    """Refuse a model whose per-example gradients the engine gets wrong, or in which rows of a micro-batch meet."""
    losses, scale = CausalLMLoss(model), loss_scale(job.dtype)
    width = min(job.groups.data.block_size, job.token_budget // 2)  # of two rows that fit the budget together
    check_rules(model, lambda *rows: losses(*rows) * scale, job.accelerator.device, width=width)


def load_trained(job: Job) -> Any:
    """The model with what is trained; the job's identity gets the model's."""
    groups, accelerator, sharding = job.groups, job.accelerator, sharding_of_launch()
    set_seed(groups.optimization.seed)  # the adapters' start; noise and sampling are keyed from the operating system
    model = load_model(
        groups.model.model_name_or_path,
        **groups.model.hub,
        dtype=torch.float32 if groups.lora.trainable else job.dtype,
        device=accelerator.device,
        bits=groups.model.qbits,
        sharding=sharding,
    )
    prepare_trainable(model, groups.lora)
    if sharding is not None:
        accelerator.print(describe_shards(model, accelerator.num_processes))
    job.identity["model"] = model_identity(model)
    if job.saved is not None and accelerator.is_main_process:
        refuse_other_run(job.saved.identity["model"], job.identity["model"])
    if job.plan.privacy is not None:
        check_neighbours(job, model)
    if recomputes(groups):
        checkpoint_activations(model)
    return model
