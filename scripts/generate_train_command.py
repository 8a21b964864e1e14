r"""Train a generator of synthetic instructions, or an assistant: print the `accelerate launch` command and run it.

    python -m scripts.generate_train_command --dataset_name NAME --model_name_or_path PATH --job_sess debug \
        --target_epsilon 5.94 --delta 5e-7 --per_device_train_batch_size 4 --gpus 1 --block_size 1024 --total_bs 4096 \
        --num_train_epochs 10 --prompt_style uncond_generation --clip_norm 0.5 --no_eval_at_start

fine-tunes on the instructions of `data/NAME` (type A). The noise is computed from --target_epsilon, where -1 trains
without privacy. With `--prompt_style vicuna` (or chat) it fine-tunes on pairs of instruction and answer, from a data
set whose name begins with `labelled` (type C). Outputs go to `outputs/[job_sess]`. The cost is entered in its
`budget.jsonl`, or in a --budget_file that all stages on the same private data share. Training without privacy voids
the budget, unless --synthetic_data says that the rows were made only from released data. --print_only only prints the
command. After an interruption run the same line again to resume. Flags after `--` are passed to train_clm.py.

Run it from the repository's root. The exit status is that of the launched command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dptune._aliases import aliases
from dptune._validate import present, refuse, renamed, require_count, require_delta, require_positive
from dptune._words import counted
from dptune.accounting import planned_steps
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.accounting.rounding import rounded_up
from dptune.budget import Budget
from dptune.ledger import LEDGER_NAME
from dptune.run.plan import make_plan
from dptune.run.settings import AUTO, PrivacySettings, noise_bands_of
from dptune.units.unit import EXAMPLE, USER_LEVEL, USER_LEVEL_METHODS, PrivacyUnit, bound_authors, group_by_author
from utils.cli.flags import exit_on_invalid_argument, given_fields, parse, refuse_unread
from utils.cli.launch_lines import as_command, as_line, launch_words, require_job, require_not_taken, split_at_dashes
from utils.data.prompts import PROMPT_STYLES, UNCONDITIONAL
from utils.data.row_authors import authors_of, refuse_unnoticed_users
from utils.data.splits import LABELLED
from utils.files.tables import read_rows
from utils.training.averaging_flags import AVERAGE_LAST, EMA, averaging_of

SCRIPT = "train_clm.py"
OUTPUTS = Path("outputs")
BUDGET_NAME = "budget.jsonl"
_SUFFIXES = ("", ".jsonl", ".json", ".csv", ".parquet")
# The engine's name of a setting -> the flag of this program.
FLAGS = {
    "steps": "--num_train_epochs",
    "group_size": "--examples_per_unit",
    "unit": "--privacy_unit",
    "budget": "--budget_file",
    "ledger": "--job_sess",
}
# The flags of train_clm.py that this program sets -> its own flag for each.
_TAKEN = {
    "train_file": "--dataset_name",
    "dataset_name": "--dataset_name",
    "model_name_or_path": "--model_name_or_path",
    "output_dir": "--job_sess",
    "target_epsilon": "--target_epsilon",
    "noise_multiplier": "--target_epsilon",
    "delta": "--delta",
    "max_batch": "--max_batch",
    "noise_bands": "--noise_bands",
    "ema": "--ema",
    "average_last": "--average_last",
    "clip_norm": "--clip_norm",
    "per_device_train_batch_size": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--total_bs",
    "num_train_epochs": "--num_train_epochs",
    "max_train_steps": "--num_train_epochs",
    "block_size": "--block_size",
    "learning_rate": "--learning_rate",
    "prompt_style": "--prompt_style",
    "eval_freq": "--eval_freq",
    "eval_at_start": "--no_eval_at_start",
    "no_eval_at_start": "--no_eval_at_start",
    "privacy_unit": "--privacy_unit",
    "examples_per_unit": "--examples_per_unit",
    "user_level_method": "--user_level_method",
    "register": "--budget_file",
    "dry_run": "--print_only",  # a dry run must not be entered in the budget
}
_ONLY_PRIVATE = ("delta", "clip_norm", "noise_bands")  # flags that only a private job reads


@dataclass
class JobArguments:
    """The training: model, data and privacy."""

    _argument_group_name = "job"

    dataset_name: str = field(metadata={"help": "file (with or without suffix) or saved DatasetDict in --data_dir"})
    model_name_or_path: str = field(
        metadata={"help": "folder or hub name of the base model", "aliases": aliases("model_name")}
    )
    job_sess: str = field(metadata={"help": f"name of the job: outputs go to {OUTPUTS}/[job_sess]"})
    target_epsilon: float = field(
        metadata={"help": "epsilon of the training; -1 trains without privacy", "aliases": aliases("eps")}
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "probability that the epsilon bound fails; default: a tenth of 1 / number of examples (authors), "
            "rounded down to a power of ten"
        },
    )
    clip_norm: float | Literal["auto"] = field(
        default=1.0,
        metadata={
            "help": "clip norm of the gradient per example or author; auto: measured on texts that the model writes",
            "aliases": aliases("clip"),
        },
    )
    total_bs: int = field(default=4096, metadata={"help": "average number of examples per step, over all GPUs"})
    max_batch: int | None = field(
        default=None,
        metadata={"help": "maximum number of examples per step: larger draws are cut; default: draws are not cut"},
    )
    noise_bands: str | None = field(
        default=None,
        metadata={
            "help": "correlate noise over so many steps (docs/how_to/training.md); 1: independent noise; default: as "
            "many as make the least noise"
        },
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "number of examples that fit on a GPU at once", "aliases": aliases("perdevice_bs")}
    )
    gpus: int = field(default=1, metadata={"help": "number of processes, one per GPU; give 1 for a CPU"})
    shard: bool = field(default=False, metadata={"help": "shard the frozen base model over the GPUs"})
    num_train_epochs: float = field(
        default=10.0, metadata={"help": "average passes over the training set", "aliases": aliases("num_epochs")}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate; default: that of train_clm.py", "aliases": aliases("lr")}
    )
    ema: float | None = field(default=None, metadata=EMA)
    average_last: float | None = field(default=None, metadata=AVERAGE_LAST)
    block_size: int = field(
        default=1024,
        metadata={"help": "maximum tokens per example; longer ones are cut", "aliases": aliases("max_seq_len")},
    )
    prompt_style: str = field(
        default=UNCONDITIONAL,
        metadata={
            "help": f"prompt format: {UNCONDITIONAL} learns to write instructions, the others to answer them",
            "choices": PROMPT_STYLES,
        },
    )
    privacy_unit: str = field(
        default=EXAMPLE,
        metadata={"help": "example, or the column of authors, who are then protected; --total_bs counts authors"},
    )
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect rows although the file names users: a user with many rows is protected less"},
    )
    examples_per_unit: int | None = field(default=None, metadata={"help": "maximum number of rows per author"})
    user_level_method: str = field(
        default=USER_LEVEL,
        metadata={
            "help": "sampling: user-level draws authors; example-level draws rows, and --total_bs counts rows",
            "choices": USER_LEVEL_METHODS,
        },
    )
    eval_freq: int = field(default=10, metadata={"help": "steps between evaluations on the validation split"})
    eval_at_start: bool = field(default=True, metadata={"help": "also evaluate before the first step"})
    synthetic_data: bool = field(
        default=False,
        metadata={
            "help": "declare that the rows were made only from released data, so that --target_epsilon -1 costs nothing"
        },
    )
    budget_file: str | None = field(
        default=None, metadata={"help": f"budget file of the pipeline; default: {BUDGET_NAME} in the job's folder"}
    )
    data_dir: str = field(default="data", metadata={"help": "folder of --dataset_name"})
    print_only: bool = field(default=False, metadata={"help": "print the command, do not run it"})

    def __post_init__(self) -> None:
        require_job(self.job_sess, OUTPUTS, gpus=self.gpus, shard=self.shard)
        for flag in ("total_bs", "per_device_train_batch_size", "block_size", "eval_freq"):
            require_count(f"--{flag}", getattr(self, flag))
        require_positive("--num_train_epochs", self.num_train_epochs)
        if self.learning_rate is not None:
            require_positive("--learning_rate", self.learning_rate)
        if self.clip_norm != AUTO:
            require_positive("--clip_norm", self.clip_norm)
        if self.target_epsilon != -1:
            require_positive("--target_epsilon", self.target_epsilon)
        if self.synthetic_data and self.private:
            refuse("--synthetic_data", True, "works only with --target_epsilon -1; give that, or leave it out")
        if self.delta is not None:
            require_delta(self.delta, name="--delta")
        if self.max_batch is not None:
            require_count("--max_batch", self.max_batch)
        with renamed({"noise_bands": "--noise_bands"}):
            noise_bands_of(self._bands)
        averaging_of(self.ema, self.average_last)
        if self.total_bs % (at_once := self.per_device_train_batch_size * self.gpus):
            refuse("--total_bs", self.total_bs, f"give a multiple of --per_device_train_batch_size x --gpus, {at_once}")
        if (self.privacy_unit == EXAMPLE) != (self.examples_per_unit is None):
            refuse("--examples_per_unit", self.examples_per_unit, "give it with --privacy_unit COLUMN, and only then")
        if self.ignore_users and self.privacy_unit != EXAMPLE:
            refuse("--ignore_users", True, "contradicts --privacy_unit; leave one out")
        if self.prompt_style != UNCONDITIONAL and not Path(self.dataset_name).name.startswith(LABELLED):
            remedy = f"--prompt_style {self.prompt_style} needs answers: give a data set named {LABELLED}..."
            refuse("--dataset_name", self.dataset_name, f"{remedy} (scripts/split_dataset.py makes one)")

    @property
    def private(self) -> bool:
        """Whether the training is private."""
        return self.target_epsilon != -1

    @property
    def _bands(self) -> str:
        return AUTO if self.noise_bands is None else self.noise_bands

    @property
    def settings(self) -> PrivacySettings:
        """The settings of a private job, as the engine takes them."""
        return PrivacySettings(
            clip_norm=1.0 if self.clip_norm == AUTO else self.clip_norm,  # of which epsilon is independent
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            noise_bands=noise_bands_of(self._bands),
        )

    @property
    def unit(self) -> PrivacyUnit:
        """The privacy unit."""
        if self.privacy_unit == EXAMPLE:
            return PrivacyUnit()
        examples = present(self.examples_per_unit, "number of examples per unit")
        return PrivacyUnit(self.privacy_unit, self.user_level_method, examples)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return OUTPUTS / self.job_sess

    @property
    def is_limited(self) -> bool:
        """Whether the budget file has a limit, so that the training itself reserves its steps there."""
        return not self.synthetic_data and Budget(self.budget_path).limit is not None

    @property
    def budget_path(self) -> Path:
        """The budget file in which the job's cost is entered."""
        return Path(self.budget_file or self.folder / BUDGET_NAME)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the cost and the launch command and, without --print_only, replace this process by the command.

    Args:
        argv: the command line; `sys.argv[1:]` if None.
    """
    own, extra = split_at_dashes(sys.argv[1:] if argv is None else argv)
    (job,) = parse(JobArguments, args=own, description=__doc__)
    if not job.private:
        refuse_unread(
            given_fields(own, [JobArguments]), _ONLY_PRIVATE, "is not read with --target_epsilon -1: leave it out", job
        )
    words = training_launch(job, extra)
    print(*describe_cost(job), *describe_entry(job), as_line(words), sep="\n", flush=True)
    if not job.print_only:
        enter_budget(job, extra)
        command = as_command(words)
        os.execv(command[0], command)  # so exit status and signals need no forwarding


def find_dataset(job: JobArguments) -> Path:
    """The file or folder of --dataset_name. Raises `InvalidArgument` if there is none."""
    candidates = [Path(job.data_dir) / f"{job.dataset_name}{suffix}" for suffix in _SUFFIXES]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        refuse("--dataset_name", job.dataset_name, f"no such file or folder in {job.data_dir}; put it there")
    return found


def training_launch(job: JobArguments, extra: Sequence[str] = ()) -> list[str]:
    """The words after `accelerate launch` for one job.

    Args:
        job: the job.
        extra: more flags of train_clm.py. Raises `InvalidArgument` for one that the job sets itself.
    """
    require_not_taken(extra, _TAKEN)
    privacy = [
        "--target_epsilon",
        repr(job.target_epsilon),
        "--clip_norm",
        str(job.clip_norm),
        *([] if job.delta is None else ["--delta", repr(job.delta)]),
        *([] if job.noise_bands is None else ["--noise_bands", job.noise_bands]),
    ]
    without = ["--clip_norm", "-1", "--noise_multiplier", "-1"]
    flags = [
        *("--train_file", str(find_dataset(job)), "--model_name_or_path", job.model_name_or_path),
        *("--output_dir", str(job.folder), "--prompt_style", job.prompt_style, "--block_size", str(job.block_size)),
        *("--per_device_train_batch_size", str(job.per_device_train_batch_size)),
        *("--gradient_accumulation_steps", str(job.total_bs // (job.per_device_train_batch_size * job.gpus))),
        *("--num_train_epochs", repr(job.num_train_epochs)),
        *([] if job.learning_rate is None else ["--learning_rate", repr(job.learning_rate)]),
        *(privacy if job.private else without),
        *([] if job.max_batch is None else ["--max_batch", str(job.max_batch)]),
        *([] if job.ema is None else ["--ema", repr(job.ema)]),
        *([] if job.average_last is None else ["--average_last", repr(job.average_last)]),
        *_unit_flags(job.unit, ignore_users=job.ignore_users),
        *(["--register", str(job.budget_path)] if job.private and job.is_limited else []),
        *("--resume_from_checkpoint", "latest"),  # starts afresh if there is no checkpoint
        *("--eval_freq", str(job.eval_freq), *([] if job.eval_at_start else ["--no_eval_at_start"])),
    ]
    return launch_words(SCRIPT, [*flags, *extra], gpus=job.gpus, shard=job.shard)


def _unit_flags(unit: PrivacyUnit, *, ignore_users: bool) -> list[str]:
    if unit.column is None:
        return ["--ignore_users"] if ignore_users else []
    return [
        *("--privacy_unit", unit.column, "--examples_per_unit", str(unit.examples)),
        *("--user_level_method", unit.method),
    ]


def describe_cost(job: JobArguments) -> list[str]:
    """The noise that --target_epsilon needs on this data set, as comment lines above the launch command.

    Raises:
        InvalidArgument: a data set that cannot be read or is smaller than the batch, an epsilon out of reach.
    """
    if not job.private:
        return [f"# no privacy: the trained model may reveal any row of {job.dataset_name}"]
    count, kind = _num_sampled(job), job.unit.sampled
    if job.total_bs > count:
        refuse("--total_bs", job.total_bs, f"{job.dataset_name} has {count} {kind} to train on; give at most that")
    delta = default_delta(count) if job.delta is None else job.delta
    require_delta(delta, count, name="--delta")
    steps = planned_steps(num_examples=count, expected_batch_size=job.total_bs, epochs=job.num_train_epochs)
    plan = make_plan(
        job.settings, num_examples=count, batch=job.total_bs, steps=steps, unit=job.unit, max_batch=job.max_batch
    )
    config = present(plan.privacy, "mechanism")
    epsilon = rounded_up(job.target_epsilon, trim=True)
    bands = f" with {config.noise_bands} noise bands" if config.noise_bands > 1 else ""
    told = f"# noise multiplier {config.noise_multiplier:g}{bands} for {count} {kind} and {counted(steps, 'step')}"
    reason = [f"# {delta_in_words(count, kind)}"] if job.delta is None else []
    return [f"{told}: epsilon {epsilon} at delta {delta:g}", *reason]


def _num_sampled(job: JobArguments) -> int:
    """The number of rows or authors that steps sample from; rows beyond a bound per author do not count."""
    rows, unit = read_rows(find_dataset(job), "--dataset_name"), job.unit
    if unit.column is not None:
        names = authors_of(rows, unit.column, "--dataset_name", job.dataset_name)
        if unit.bounds_authors:
            return len(bound_authors(rows, names, unit.examples, seed=0)[0])  # the number does not depend on the seed
        return len(group_by_author(names))
    if not job.ignore_users:
        refuse_unnoticed_users(rows, "--dataset_name", job.dataset_name, "--privacy_unit")
    return len(rows)


def describe_entry(job: JobArguments) -> list[str]:
    """A comment line that --print_only does not enter the job in the budget."""
    if not job.print_only or job.synthetic_data:
        return []
    return [f"# NOT entered in {job.budget_path} because of --print_only: its total will lack this job"]


def enter_budget(job: JobArguments, extra: Sequence[str] = ()) -> None:
    """Enter the job in the budget before anything runs: see `dptune.budget`.

    Training without privacy voids the budget. Only the user can say that a data set is synthetic; its name proves
    nothing.
    """
    if job.synthetic_data:
        return
    budget = Budget(job.budget_path)
    stage = f"{'generator' if job.prompt_style == UNCONDITIONAL else 'assistant'} {job.job_sess}"
    if any(word.partition("=")[0].replace("-", "_") == "__insecure_test_seed" for word in extra):
        budget.enter_without_privacy(stage, "the noise comes from a fixed key, so anyone can repeat it")
    elif job.private and not job.is_limited:
        budget.enter_training(stage, job.folder / LEDGER_NAME, unit=job.unit.name)
    elif not job.private:
        budget.enter_without_privacy(stage, f"trained without privacy on {job.dataset_name}")


if __name__ == "__main__":
    with exit_on_invalid_argument(JobArguments, flags=FLAGS):
        main()
