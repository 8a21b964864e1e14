r"""Train a generator of synthetic instructions, or an assistant: print the `accelerate launch` line and run it.

    python -m scripts.generate_train_command --dataset_name NAME --model_name PATH --job_sess debug \
        --eps 5.94 --delta 5e-7 --perdevice_bs 4 --gpus 1 --max_seq_len 1024 --total_bs 4096 --num_epochs 10 \
        --prompt_style uncond_generation --lr 1e-3 --clip 0.5 --no_eval_at_start

fine-tunes on the instructions of `data/NAME` (type A): the noise is found from --eps, --eps -1 is no privacy. With
`--prompt_style vicuna` (or chat) it fine-tunes on pairs of instruction and answer, in a data set whose name begins with
`labelled` (type C). Outputs go to `outputs/[job_sess]`, and what is spent is entered in its `budget.jsonl`, or in the
--budget_file of other stages on the same private data, where the histogram of a resampling can be added. A training
without privacy voids that budget, unless --synthetic_data says that its rows tell nothing beyond what was released.
--print_only prints the line alone. The same line goes on after an interruption. Flags behind `--` are train_clm.py's.

Run it from the repository's root. The exit status is the launch's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import present, refuse, require_count, require_delta, require_positive
from dptune.accounting import noise_multiplier, planned_steps
from dptune.accounting.rounding import rounded_up
from dptune.budget import Budget
from dptune.units.unit import EXAMPLE, USER_LEVEL, USER_LEVEL_METHODS, PrivacyUnit, bound_authors, group_by_author
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.cli.launch_lines import as_command, as_line, launch_words, require_job, require_not_taken, split_at_dashes
from utils.data.prompts import PROMPT_STYLES, UNCONDITIONAL
from utils.data.row_authors import authors_of, refuse_unnoticed_users
from utils.data.splits import LABELLED
from utils.files.tables import read_rows

SCRIPT = "train_clm.py"
OUTPUTS = Path("outputs")
BUDGET_NAME = "budget.jsonl"
_SUFFIXES = ("", ".jsonl", ".json", ".csv", ".parquet")
# What the engine calls this program's settings.
FLAGS = {
    "target_epsilon": "--eps",
    "steps": "--num_epochs",
    "group_size": "--examples_per_unit",
    "unit": "--privacy_unit",
    "budget": "--budget_file",
    "ledger": "--job_sess",
}
# Of train_clm.py's flags those that a job's own flags decide.
_TAKEN = {
    "train_file": "--dataset_name",
    "dataset_name": "--dataset_name",
    "model_name_or_path": "--model_name",
    "output_dir": "--job_sess",
    "target_epsilon": "--eps",
    "noise_multiplier": "--eps",
    "delta": "--delta",
    "clip_norm": "--clip",
    "per_device_train_batch_size": "--perdevice_bs",
    "gradient_accumulation_steps": "--total_bs",
    "num_train_epochs": "--num_epochs",
    "max_train_steps": "--num_epochs",
    "block_size": "--max_seq_len",
    "learning_rate": "--lr",
    "prompt_style": "--prompt_style",
    "eval_freq": "--eval_freq",
    "eval_at_start": "--no_eval_at_start",
    "no_eval_at_start": "--no_eval_at_start",
    "privacy_unit": "--privacy_unit",
    "examples_per_unit": "--examples_per_unit",
    "user_level_method": "--user_level_method",
    "dry_run": "--print_only",  # the budget would be entered for it
}


@dataclass
class JobArguments:
    """What is trained, on what, at which epsilon."""

    _argument_group_name = "job"

    dataset_name: str = field(metadata={"help": "file (its suffix may be left out) or saved DatasetDict in --data_dir"})
    model_name: str = field(metadata={"help": "folder or hub name of the base model"})
    job_sess: str = field(metadata={"help": f"name of the job: outputs go to {OUTPUTS}/[job_sess]"})
    eps: float = field(metadata={"help": "epsilon of the training; -1: no privacy"})
    delta: float = field(default=5e-7, metadata={"help": "chance that the bound may fail"})
    clip: float = field(default=1.0, metadata={"help": "clip norm of an example's gradient"})
    total_bs: int = field(default=4096, metadata={"help": "the logical batch in expectation, over all GPUs"})
    perdevice_bs: int = field(default=4, metadata={"help": "examples that fit a GPU at once"})
    gpus: int = field(default=1, metadata={"help": "processes, one a GPU; 1 also for a CPU"})
    shard: bool = field(default=False, metadata={"help": "spread the frozen base over the GPUs"})
    num_epochs: float = field(default=10.0, metadata={"help": "expected passes over the training set"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    max_seq_len: int = field(default=1024, metadata={"help": "longest example in tokens; longer ones are cut"})
    prompt_style: str = field(
        default=UNCONDITIONAL,
        metadata={
            "help": f"{UNCONDITIONAL} learns to write instructions, the others to answer them",
            "choices": PROMPT_STYLES,
        },
    )
    privacy_unit: str = field(
        default=EXAMPLE, metadata={"help": "example, or the column of each row's author: then --total_bs is of authors"}
    )
    ignore_users: bool = field(
        default=False, metadata={"help": "protect rows although the file names users: one user's rows add up"}
    )
    examples_per_unit: int | None = field(default=None, metadata={"help": "most rows of an author"})
    user_level_method: str = field(
        default=USER_LEVEL,
        metadata={
            "help": "user-level draws authors; example-level draws rows, --total_bs is then of rows",
            "choices": USER_LEVEL_METHODS,
        },
    )
    eval_freq: int = field(default=10, metadata={"help": "steps between measurements of the validation loss"})
    eval_at_start: bool = field(default=True, metadata={"help": "measure it before the first step too"})
    synthetic_data: bool = field(
        default=False, metadata={"help": "the rows were made of released things alone: --eps -1 then spends nothing"}
    )
    budget_file: str | None = field(
        default=None, metadata={"help": f"the pipeline's budget; default: {BUDGET_NAME} of the job"}
    )
    data_dir: str = field(default="data", metadata={"help": "where --dataset_name is looked for"})
    print_only: bool = field(default=False, metadata={"help": "print the line, do not run it"})

    def __post_init__(self) -> None:
        require_job(self.job_sess, OUTPUTS, gpus=self.gpus, shard=self.shard)
        for flag in ("total_bs", "perdevice_bs", "max_seq_len", "eval_freq"):
            require_count(f"--{flag}", getattr(self, flag))
        for flag in ("clip", "num_epochs", "lr"):
            require_positive(f"--{flag}", getattr(self, flag))
        if self.eps != -1:
            require_positive("--eps", self.eps)
        if self.synthetic_data and self.private:
            refuse("--synthetic_data", True, "its budget counts nothing: give --eps -1, or leave it out")
        require_delta(self.delta, name="--delta")
        if self.total_bs % (at_once := self.perdevice_bs * self.gpus):
            refuse("--total_bs", self.total_bs, f"give a multiple of --perdevice_bs x --gpus, {at_once}")
        if (self.privacy_unit == EXAMPLE) != (self.examples_per_unit is None):
            refuse("--examples_per_unit", self.examples_per_unit, "give it with --privacy_unit COLUMN, and only then")
        if self.ignore_users and self.privacy_unit != EXAMPLE:
            refuse("--ignore_users", True, "leave it out where --privacy_unit names the users")
        if self.prompt_style != UNCONDITIONAL and not Path(self.dataset_name).name.startswith(LABELLED):
            remedy = f"--prompt_style {self.prompt_style} learns answers: give a data set named {LABELLED}..."
            refuse("--dataset_name", self.dataset_name, f"{remedy} (scripts/split_dataset.py makes one)")

    @property
    def private(self) -> bool:
        """Whether there is an epsilon."""
        return self.eps != -1

    @property
    def unit(self) -> PrivacyUnit:
        """Whose presence is hidden."""
        if self.privacy_unit == EXAMPLE:
            return PrivacyUnit()
        examples = present(self.examples_per_unit, "number of examples per unit")
        return PrivacyUnit(self.privacy_unit, self.user_level_method, examples)

    @property
    def folder(self) -> Path:
        """Where outputs go."""
        return OUTPUTS / self.job_sess

    @property
    def budget_path(self) -> Path:
        """Where it is entered what the job will spend."""
        return Path(self.budget_file or self.folder / BUDGET_NAME)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the launch line with what it costs and, unless it is only to be printed, become the launch.

    Args:
        argv: the command line; `sys.argv[1:]` if None.
    """
    own, extra = split_at_dashes(sys.argv[1:] if argv is None else argv)
    (job,) = parse(JobArguments, args=own, description=__doc__)
    words = training_launch(job, extra)
    print(*describe_cost(job), *describe_entry(job), as_line(words), sep="\n", flush=True)
    if not job.print_only:
        enter_budget(job, extra)
        command = as_command(words)
        os.execv(command[0], command)  # its exit status and the signals for it need no passing on


def find_dataset(job: JobArguments) -> Path:
    """The file or folder of --dataset_name. Raises `InvalidArgument` where there is none."""
    candidates = [Path(job.data_dir) / f"{job.dataset_name}{suffix}" for suffix in _SUFFIXES]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        refuse("--dataset_name", job.dataset_name, f"no such file or folder in {job.data_dir}; put it there")
    return found


def training_launch(job: JobArguments, extra: Sequence[str] = ()) -> list[str]:
    """The words behind `accelerate launch` for one job.

    Args:
        job: what is trained.
        extra: more flags of train_clm.py. Raises `InvalidArgument` for one that a job's own flag sets.
    """
    require_not_taken(extra, _TAKEN)
    privacy = ["--target_epsilon", repr(job.eps), "--clip_norm", repr(job.clip), "--delta", repr(job.delta)]
    without = ["--clip_norm", "-1", "--noise_multiplier", "-1"]
    flags = [
        *("--train_file", str(find_dataset(job)), "--model_name_or_path", job.model_name),
        *("--output_dir", str(job.folder), "--prompt_style", job.prompt_style, "--block_size", str(job.max_seq_len)),
        *("--per_device_train_batch_size", str(job.perdevice_bs)),
        *("--gradient_accumulation_steps", str(job.total_bs // (job.perdevice_bs * job.gpus))),
        *("--num_train_epochs", repr(job.num_epochs), "--learning_rate", repr(job.lr)),
        *(privacy if job.private else without),
        *_unit_flags(job.unit),
        *("--resume_from_checkpoint", "latest"),  # from its beginning where there is none
        *("--eval_freq", str(job.eval_freq), *([] if job.eval_at_start else ["--no_eval_at_start"])),
    ]
    return launch_words(SCRIPT, [*flags, *extra], gpus=job.gpus, shard=job.shard)


def _unit_flags(unit: PrivacyUnit) -> list[str]:
    if unit.column is None:
        return []
    return [
        *("--privacy_unit", unit.column, "--examples_per_unit", str(unit.examples)),
        *("--user_level_method", unit.method),
    ]


def describe_cost(job: JobArguments) -> list[str]:
    """The noise that --eps needs on this data set, as comment lines above the launch line.

    Raises:
        InvalidArgument: a data set that cannot be read or is smaller than the batch, an epsilon out of reach.
    """
    if not job.private:
        return [f"# no privacy: what is trained is as private as {job.dataset_name} itself"]
    count, kind = _num_sampled(job), job.unit.sampled
    if job.total_bs > count:
        refuse("--total_bs", job.total_bs, f"{job.dataset_name} has {count} {kind} to train on; give at most that")
    require_delta(job.delta, count, name="--delta")
    steps = planned_steps(num_examples=count, expected_batch_size=job.total_bs, epochs=job.num_epochs)
    sigma = noise_multiplier(
        target_epsilon=job.eps,
        delta=job.delta,
        sampling_probability=job.total_bs / count,
        steps=steps,
        group_size=job.unit.group_size,
    )
    epsilon = rounded_up(job.eps, trim=True)
    return [f"# noise multiplier {sigma:g} for {count} {kind} and {steps} steps: epsilon {epsilon} at {job.delta:g}"]


def _num_sampled(job: JobArguments) -> int:
    """What a step draws of: rows (those that are kept, where authors are bounded), or authors."""
    rows, unit = read_rows(find_dataset(job), "--dataset_name"), job.unit
    if unit.column is not None:
        names = authors_of(rows, unit.column, "--dataset_name", job.dataset_name)
        if unit.bounds_authors:
            return len(bound_authors(rows, names, unit.examples, seed=0)[0])  # as many whatever the seed
        return len(group_by_author(names))
    if not job.ignore_users:
        refuse_unnoticed_users(rows, "--dataset_name", job.dataset_name, "--privacy_unit")
    return len(rows)


def describe_entry(job: JobArguments) -> list[str]:
    """A comment line where the launch line will not be entered into the budget by what prints it."""
    if not job.print_only or job.synthetic_data:
        return []
    return [f"# not entered into {job.budget_path}, which is done without --print_only: its total will lack this job"]


def enter_budget(job: JobArguments, extra: Sequence[str] = ()) -> None:
    """Say in the budget, before anything runs, what will be spent: see `dptune.budget`.

    A training without privacy voids the budget; no name of a data set proves that it is synthetic, its user says so.
    """
    if job.synthetic_data:
        return
    from dptune.run.checkpoint import LEDGER_NAME  # torch: not while flags are parsed

    budget = Budget(job.budget_path)
    stage = f"{'generator' if job.prompt_style == UNCONDITIONAL else 'assistant'} {job.job_sess}"
    if any(word.partition("=")[0].replace("-", "_") == "__insecure_test_seed" for word in extra):
        budget.enter_without_privacy(stage, "the noise comes from a fixed key, which anybody can repeat")
    elif job.private:
        budget.enter_training(stage, job.folder / LEDGER_NAME, unit=job.unit.name)
    else:
        budget.enter_without_privacy(stage, f"trained without privacy on {job.dataset_name}")


if __name__ == "__main__":
    with exit_on_invalid_argument(JobArguments, flags=FLAGS):
        main()
