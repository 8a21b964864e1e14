"""Turns the flags of train_clm.py into a job: its data, its plan, and all that is printed before weights are read."""

from __future__ import annotations

from typing import Any

from dptune._validate import refuse
from dptune.averaging import describe_averaging
from dptune.clipping import layers_of
from dptune.report.prior import PriorRelease
from dptune.run.identity import mechanism_identity, num_trained
from dptune.run.plan import RunPlan
from dptune.run.plan_lines import describe_needed_data, describe_noise, describe_register
from utils.cli.flags import public_config
from utils.cli.launch import ranks_of
from utils.cli.machines import machine_of
from utils.data.prompts import PROMPT_STYLE_OF_ROWS
from utils.data.template_date import TEMPLATE_DATE
from utils.data.tokenization import TokenizedDataset
from utils.files.shards import paths_in_words
from utils.models.loading import is_configuration, load_tokenizer
from utils.training.arguments import OF_ADAPTER, ON_RESUME, Groups
from utils.training.causal_lm.data import load_rows, look_at, runs_date
from utils.training.causal_lm.job import CausalLMJob, with_clip_norm
from utils.training.causal_lm.skeleton import (
    describe_memory_of,
    prepared_skeleton,
    shards_whole_model,
    token_budget_of,
)
from utils.training.changes import describe_changes, resumed_config
from utils.training.chosen_defaults import describe_chosen, with_chosen_defaults
from utils.training.initial_adapter import describe_start, initial_releases, start_identity
from utils.training.micro_batches import remembered_budget
from utils.training.plan import describe_clipping, describe_run, num_sampled, plan_run
from utils.training.resume import processes_of_plan, refuse_other_beginning
from utils.training.run import RunFolder
from utils.training.target import Target, target_of


def plan_job(groups: Groups, folder: RunFolder) -> CausalLMJob:
    """Plan a run, and print all that can be known before the weights are read.

    Raises:
        InvalidArgument: for a mistake in the flags, the data or the launch.
    """
    groups, accelerator, ranks = _as_begun(groups, folder), folder.accelerator, ranks_of(folder.accelerator)
    target, private = target_of(groups.planning, accelerator), groups.privacy.is_private
    starts_from = ranks.from_main(lambda: initial_releases(groups.lora, private=private))
    skeleton, names = _skeleton(groups, target)
    tokenizer = load_tokenizer(groups.model.model_name_or_path, **groups.model.hub)
    day, machine = runs_date(tokenizer, folder), machine_of(accelerator)
    rows = load_rows(groups, folder, tokenizer, names, day=day, machine=machine)
    has_validation, whole_shards = rows.held_out is not None, shards_whole_model(groups)
    groups.output.require_selection(private=private, has_validation=has_validation, sharded=whole_shards)
    fingerprint, described = machine.once(lambda: look_at(rows.train, rows.held_out, groups, skeleton, tokenizer))
    processes = processes_of_plan(folder.saved, groups.optimization, target.processes)
    plan = _plan(groups, rows.train, names, processes, num_trained(skeleton))
    flags, groups = groups, with_chosen_defaults(groups, skeleton, plan.privacy)
    dated = {} if day is None else {TEMPLATE_DATE: day}
    identity = _identity(groups, fingerprint, starts_from) | dated
    if folder.saved is not None:
        refuse_other_beginning(folder.saved, mechanism_identity(plan) | identity)
    made = {"num_processes": processes, PROMPT_STYLE_OF_ROWS: rows.train.prompt_style}
    config = _config(groups, folder, plan, made, dated, goes_on=bool(starts_from))
    asked = token_budget_of(groups)
    job = CausalLMJob(
        groups=groups,
        folder=folder,
        dtype=target.dtype,
        names=names,
        tokenizer=tokenizer,
        plan=plan,
        config=config,
        identity=identity,
        token_budget=ranks.from_main(lambda: remembered_budget(folder.path, asked)),
        asked=asked,
        starts_from=starts_from,
        **vars(rows),
    )
    _print_plan(job, skeleton, target, describe_chosen(flags, groups), described)
    return job


def _as_begun(groups: Groups, folder: RunFolder) -> Groups:
    """The flags, with the clip norm that a resumed run measured when it began."""
    if not groups.privacy.clip_norm_is_open or folder.saved is None:
        return groups
    began = folder.saved.identity["clip_norm"]
    return groups if began is None else with_clip_norm(groups, began)


def _skeleton(groups: Groups, target: Target) -> tuple[Any, list[str]]:
    """See `prepared_skeleton`; refuses a configuration without weights."""
    name = groups.model.model_name_or_path
    if is_configuration(name):
        refuse(
            "--model_name_or_path", name, "is a configuration, enough for --dry_run alone; give a folder with a model"
        )
    return prepared_skeleton(groups, target)


def _plan(groups: Groups, train: TokenizedDataset, names: list[str], processes: int, trained: int) -> RunPlan:
    """Steps and noise for these rows."""
    clipping = groups.clipping.style(layers_of(names).values())
    return plan_run(
        groups.privacy,
        groups.optimization,
        num_examples=num_sampled(groups.privacy.unit, train),
        world_size=processes,
        clipping=clipping,
        parts=train.parts,
        views=groups.views.views,
        trained=trained,
    )


def _identity(groups: Groups, fingerprint: str, starts_from: tuple[PriorRelease, ...]) -> dict[str, Any]:
    """What a resumed run must share, besides the mechanism and the model."""
    optimization = groups.optimization
    identity = {"training_data": fingerprint, "optimizer": optimization.optimizer, **optimization.averaging.identity}
    return identity | start_identity(starts_from)


def _config(
    groups: Groups,
    folder: RunFolder,
    plan: RunPlan,
    made: dict[str, Any],
    dated: dict[str, str],
    *,
    goes_on: bool,
) -> dict[str, Any]:
    """The settings to record: the flags and what followed from them, with the history of their changes.

    Args:
        groups, folder, plan: the run's.
        made: settings that follow from the launch and the rows.
        dated: the day that the chat template tells, if it tells one.
        goes_on: whether training goes on from an adapter, which decides some settings.
    """
    files = {name: paths_in_words(getattr(groups.data, name)) for name in ("train_file", "validation_file")}
    delta = {} if plan.privacy is None else {"delta": plan.privacy.delta}
    decided = dict.fromkeys(OF_ADAPTER) if goes_on else {}
    return resumed_config(public_config(*groups) | files | made | delta | dated | decided, folder.saved, ON_RESUME)


def _print_plan(job: CausalLMJob, skeleton: Any, target: Target, chosen: list[str], described: list[str]) -> None:
    """Print the plan, what changed since the run began, the data and the memory.

    Args:
        job: the run.
        skeleton: see `prepared_skeleton`.
        target: the devices.
        chosen: lines about what the flags left open.
        described: lines about the data.
    """
    groups, folder, plan, accelerator = job.groups, job.folder, job.plan, job.folder.accelerator
    lines = [*describe_run(plan, groups.privacy), *describe_clipping(plan, groups.optimization), *chosen]
    lines += describe_averaging(groups.optimization.averaging, plan.steps)
    lines += describe_register(plan, folder.path, resumes=folder.saved is not None)
    lines += [*describe_changes(job.config, folder.saved), *described, *describe_start(job.starts_from)]
    if job.token_budget != job.asked:
        lines.append(f"tokens at a time       {job.token_budget:,}; {job.asked:,} did not fit in memory before")
    lines += describe_memory_of(skeleton, groups, target, plan, job.token_budget)
    accelerator.print(*lines, *describe_noise(plan, num_trained(skeleton)), sep="\n")
    if folder.output.dry_run and accelerator.is_main_process:
        for line in describe_needed_data(plan):
            print(line)
