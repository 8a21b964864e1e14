"""One training run from the command line, new or resumed, alone in its folder, until its end or a signal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dptune.run.checkpoint import TrainingState
from dptune.run.lock import FolderLock
from dptune.run.plan import RunPlan
from dptune.run.session import PrivateRun
from utils.cli.launch import ranks_of
from utils.cli.settings_file import write_settings
from utils.cli.trackers import start_trackers
from utils.training.changes import without_unused
from utils.training.loop import End, Pace, TrainingLoop, describe_selection, describe_stop
from utils.training.micro_batches import MicroBatches
from utils.training.output_arguments import OutputArguments
from utils.training.outputs import finish_run, write_config
from utils.training.resume import Checkpoints, find_saved_run, saved_run
from utils.training.task import Task


@dataclass(frozen=True)
class RunFolder:
    """The locked folder of a run, and the checkpoint to resume in it.

    Attributes:
        path: the folder; it may not exist yet.
        output: the output flags.
        saved: the checkpoint to resume; None for a new run.
        accelerator: the accelerator of the launch.
        lock: the lock, held by the main process.
    """

    path: Path
    output: OutputArguments
    saved: TrainingState | None
    accelerator: Accelerator
    lock: FolderLock


@contextmanager
def open_folder(output: OutputArguments, accelerator: Accelerator) -> Iterator[RunFolder]:
    """Lock a run's folder, if it exists, and find what --resume_from_checkpoint names. Every rank calls it.

    A dry run takes no lock, because it writes nothing.

    Raises:
        InvalidArgument: another process works in the folder, or it holds a run that is not being resumed.
    """
    path, ranks = Path(output.output_dir), ranks_of(accelerator)
    with FolderLock(enabled=ranks.is_main and not output.dry_run) as lock:
        ranks.from_main(lambda: lock.take(path))
        yield RunFolder(path, output, ranks.from_main(lambda: find_saved_run(output)), accelerator, lock)


def train(
    task: Task,
    plan: RunPlan,
    folder: RunFolder,
    micro_batches: MicroBatches,
    pace: Pace,
    config: dict[str, Any],
    flags: Mapping[str, Any],
) -> End:
    """Train a task and write all results of the run; returns how it ended.

    Args:
        task: the task, with its model loaded and checked.
        plan: the sampling, the noise and the number of steps.
        folder: see `open_folder`.
        micro_batches: the task's rows, dealt to this rank.
        pace: the optimizer, and when to evaluate.
        config: the resolved settings, without secrets; see `resumed_config`.
        flags: the flags of this launch, without secrets; see `public_config`.
    """
    accelerator, ranks, output = folder.accelerator, ranks_of(folder.accelerator), folder.output
    ranks.from_main(lambda: folder.lock.make(folder.path))
    resumed = saved_run(folder.saved, folder.path)
    run = PrivateRun(
        plan, folder.path, ranks, resume_from=resumed, identity=task.identity, starts_from=task.starts_from
    )
    config = without_unused(config, run.last)
    if ranks.is_main:
        write_config(folder.path, config)
        write_settings(folder.path, flags)
    start_trackers(accelerator, output.trackers, "dptune", config, logging_dir=folder.path / "tracking")
    checkpoints = Checkpoints(run, config, output.checkpointing_steps, output.save_total_limit, task.trained)
    end, rows = TrainingLoop(run, task, micro_batches, checkpoints, pace).train(folder.saved, track=accelerator.log)
    if end.stopped_by is not None:
        accelerator.print(describe_stop(end, plan.steps, folder.path))
    elif ranks.is_main:
        for line in describe_selection(end, run.last):
            print(line)
        finish_run(run, task, rows, released=end.released, average=end.average)
    else:
        task.help_save()
    accelerator.wait_for_everyone()
    return end
