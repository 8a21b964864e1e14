"""Makes a proposal: settings that fit the memory and the time, and that are best by the rule."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from dptune._validate import present, refuse
from dptune.accounting.delta import default_delta
from dptune.bands import bands_within
from dptune.integrations.vocabulary import context_of
from dptune.mechanism import PrivacyConfig
from dptune.run.identity import num_trained
from dptune.run.plan import RunPlan
from utils.models.loading import load_skeleton, require_context
from utils.models.memory import MemorySettings
from utils.models.trainable import prepare_trainable
from utils.planning.arguments import PlannerArguments
from utils.planning.flags import as_groups, trained_flags, training_line
from utils.planning.micro_batch import FittedMicroBatch, largest_micro_batch
from utils.planning.rule import Rule
from utils.planning.search import Limits, best, search
from utils.planning.settings import CLIP_NORM, WARMUP, choose_rank, choose_rate, with_rank
from utils.planning.speed import Speed, estimated_speed, measured_speed
from utils.training.causal_lm.skeleton import memory_settings
from utils.training.chosen_defaults import width_of
from utils.training.lora_arguments import LoraArguments
from utils.training.plan import needs_of, plan_run
from utils.training.target import Target, target_without_launch

_BLOCK = 64  # the default block size is a multiple of it
_FAR = 4  # times the steps of the longest fitted run: no longer runs are proposed


@dataclass(frozen=True)
class Proposal:
    """Settings of a run, and what they were compared with.

    Attributes:
        limits: the data, the time that the run takes at most, and the processes.
        options: a mechanism for each batch that was compared, the smallest first; their noise is rough.
        chosen: one of them.
        plan: the run's plan, with its own noise.
        rate: the learning rate, and where it comes from.
        lora: the flags of what is trained.
        model: the model without its weights, with its trained parameters.
        memory: what the memory depends on besides the model.
        available: bytes of memory of a device; None if unknown.
        line: the line that trains.
    """

    limits: Limits
    options: list[PrivacyConfig]
    chosen: PrivacyConfig
    plan: RunPlan
    rate: tuple[float, str]
    lora: LoraArguments
    model: Any
    memory: MemorySettings
    available: int | None
    line: str

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return num_trained(self.model)

    def around(self, count: int) -> list[PrivacyConfig]:
        """The options next to the chosen one, with it: `count` of them, or all if there are fewer."""
        place = self.options.index(self.chosen)
        first = max(0, min(place - count // 2, len(self.options) - count))
        return self.options[first : first + count]


def propose(given: PlannerArguments, lora: LoraArguments, named: Collection[str], rule: Rule) -> Proposal:
    """The settings with the least loss by the rule, among those that fit the memory and the time.

    Args:
        given: the planner's flags.
        lora: the flags of what is trained.
        named: names of the flags that the user gave, see `utils.cli.flags.given_fields`.
        rule: how the loss depends on steps and noise.

    Raises:
        InvalidArgument: there is no such model, it does not fit the flags or the memory, or see `candidates`.
    """
    target = target_without_launch(given.device, given.processes)
    lora = with_rank(lora, named)
    model = _prepared(given, lora, target)
    asked = _asked(given, _block_size(given, model))
    like = memory_settings(as_groups(asked | trained_flags(lora)), target, given.num_examples)
    micro = largest_micro_batch(needs_of(model), like, target)
    limits, options = search(_limits(given, model, _speed(given, model, micro), rule), given.target_epsilon, rule)
    chosen = best(options, rule)
    lora = with_rank(lora, named, choose_rank(chosen, num_trained(model)))
    every = sum(parameter.numel() for parameter in model.parameters())
    rate = choose_rate(rule, chosen, every, width_of(model.config), whole=bool(lora.trainable))
    share = int(chosen.expected_batch_size) // given.processes
    micro = replace(micro, rows=min(micro.rows, share))
    flags = asked | _found(chosen, micro, share, rate[0]) | trained_flags(lora)
    groups = as_groups(flags)
    plan = plan_run(groups.privacy, groups.optimization, num_examples=given.num_examples, world_size=given.processes)
    return Proposal(
        limits,
        options,
        chosen,
        plan,
        rate,
        lora,
        _prepared(given, lora, target),
        micro.settings(memory_settings(groups, target, plan.expected_batch_size), target),
        target.memory,
        training_line(flags, given.device, given.processes, shard=micro.shard),
    )


def _prepared(given: PlannerArguments, lora: LoraArguments, target: Target) -> Any:
    """The model without its weights, with its trained parameters."""
    model = load_skeleton(given.model_name_or_path)
    prepare_trainable(model, lora, dtype=target.dtype)
    return model


def _block_size(given: PlannerArguments, model: Any) -> int:
    """Tokens of the longest row: the given number, or enough for rows of twice the average."""
    context = context_of(model)
    size = math.ceil(2 * given.tokens_per_example / _BLOCK) * _BLOCK
    size = given.block_size or (size if context is None else min(size, context))
    require_context(model, size)
    if given.tokens_per_example > size:
        remedy = f"rows are cut to --block_size {size}, so the average is at most that; give the average after cutting"
        refuse("--tokens_per_example", given.tokens_per_example, remedy)
    return size


def _limits(given: PlannerArguments, model: Any, speed: Speed, rule: Rule) -> Limits:
    return Limits(
        num_examples=given.num_examples,
        tokens_per_example=given.tokens_per_example,
        delta=_delta(given),
        seconds=3600 * given.hours,
        speed=speed,
        processes=given.processes,
        most_steps=_FAR * rule.steps[1],
        most_bands=bands_within(num_trained(model)),
    )


def _delta(given: PlannerArguments) -> float:
    return default_delta(given.num_examples) if given.delta is None else given.delta


def _asked(given: PlannerArguments, block_size: int) -> dict[str, object]:
    """The flags of train_clm.py that do not depend on the search."""
    return {
        "model_name_or_path": given.model_name_or_path,
        "train_file": [given.train_file],
        "output_dir": given.output_dir,
        "block_size": block_size,
        "target_epsilon": given.target_epsilon,
        "delta": _delta(given),
        "clip_norm": CLIP_NORM,
        "warmup_ratio": WARMUP,
    }


def _found(config: PrivacyConfig, micro: FittedMicroBatch, share: int, rate: float) -> dict[str, object]:
    """The flags of train_clm.py that the search found; `share` rows of a batch are each process's."""
    return {
        "per_device_train_batch_size": micro.rows,
        "gradient_accumulation_steps": share // micro.rows,
        "max_train_steps": config.steps,
        "noise_bands": config.noise_bands,
        "learning_rate": rate,
        **({"gradient_ckpt": True} if micro.recompute else {}),
    }


def _speed(given: PlannerArguments, model: Any, micro: FittedMicroBatch) -> Speed:
    if given.tokens_per_second is not None:
        return measured_speed(given.tokens_per_second)
    device = present(given.device, "device")
    return estimated_speed(model, given.tokens_per_example, device, given.processes, recompute=micro.recompute)
