"""The plan of a dry run that cannot count tokens: from a model's configuration alone, or without data.

Privacy and memory need neither weights nor tokenizer: they follow from the flags, the model's shape and the number of
rows.
"""

from __future__ import annotations

from dptune._validate import refuse
from dptune.averaging import describe_averaging
from dptune.clipping import layers_of
from dptune.run.identity import num_trained
from dptune.run.plan import RunPlan
from dptune.run.plan_lines import describe_needed_data, describe_register
from utils.cli.launch import ranks_of
from utils.data.count_rows import count_sampled
from utils.models.loading import is_configuration
from utils.training.arguments import Groups
from utils.training.causal_lm.skeleton import describe_memory_of, prepared_skeleton
from utils.training.chosen_defaults import describe_chosen, with_chosen_defaults
from utils.training.initial_adapter import describe_start, initial_releases
from utils.training.plan import describe_clipping, describe_run, plan_run
from utils.training.run import RunFolder
from utils.training.target import target_of

_LEFT_OUT = "Left out: rows cut to --block_size, rows without an answer, held-out rows"


def lacks_tokens(groups: Groups) -> str | None:
    """Why a dry run can count no tokens; None if it can."""
    if not groups.output.dry_run:
        return None
    if groups.planning.num_examples is not None:
        return "there are no data"
    return "there is no tokenizer" if is_configuration(groups.model.model_name_or_path) else None


def plan_without_tokens(groups: Groups, folder: RunFolder, why: str) -> RunPlan:
    """Print the plan of a run as far as it does not depend on tokens. Every rank calls it.

    Args:
        groups: the flags.
        folder: where the run would be.
        why: see `lacks_tokens`.

    Raises:
        InvalidArgument: for a mistake in the flags, the data or the launch, or a run to resume.
    """
    if (resume := groups.output.resume_from_checkpoint) is not None:
        refuse("--resume_from_checkpoint", resume, f"{why} to compare a run with; leave it out")
    if (weights := groups.data.train_file_weights) is not None:
        given = " ".join(f"{weight:g}" for weight in weights)
        refuse("--train_file_weights", given, f"{why}, so rows are counted alike; leave the weights out")
    accelerator, ranks, private = folder.accelerator, ranks_of(folder.accelerator), groups.privacy.is_private
    target = target_of(groups.planning, accelerator)
    starts_from = ranks.from_main(lambda: initial_releases(groups.lora, private=private))
    skeleton, names = prepared_skeleton(groups, target)
    num_examples = ranks.from_main(lambda: count(groups))
    clipping = groups.clipping.style(layers_of(names).values())
    plan = plan_run(
        groups.privacy,
        groups.optimization,
        num_examples=num_examples,
        world_size=target.processes,
        clipping=clipping,
        views=groups.views.views,
        trained=num_trained(skeleton),
    )
    asked, groups = groups, with_chosen_defaults(groups, skeleton, plan.privacy)
    lines = [*describe_run(plan, groups.privacy), *describe_clipping(plan, groups.optimization)]
    lines += [
        *describe_chosen(asked, groups),
        *describe_averaging(groups.optimization.averaging, plan.steps),
        *describe_register(plan, groups.output.output_dir),
        f"tokens                 not counted: {why}. {_LEFT_OUT}",
        *describe_start(starts_from),
        *describe_memory_of(skeleton, groups, target, plan),
    ]
    accelerator.print(*lines, sep="\n")
    if ranks.is_main:
        for line in describe_needed_data(plan):
            print(line)
    return plan


def count(groups: Groups) -> int:
    """How many rows or authors a step draws from: --num_examples or those of the data, and canaries.

    Raises:
        InvalidArgument: a mistake in the data or their flags, or neither data nor --num_examples.
    """
    data, planning = groups.data, groups.planning
    if planning.num_examples is not None:
        return planning.num_examples + groups.privacy.num_canaries
    if data.train_file is None and data.dataset_name is None:
        refuse("--train_file", None, "give data, or --num_examples for a plan without data")
    unit = groups.privacy.unit
    rows, users = data.training_rows(unit), groups.privacy.users_flag
    counted = count_sampled(rows, unit, prompt_style=data.prompt_style, named=data.named, users_flag=users)
    return counted + groups.privacy.num_canaries
