r"""Fine-tune a sentence classifier, with or without privacy, in one of nine modes (`--finetune_mode`).

    python train_classifier.py --datasets sst2 --finetune_mode full
    python train_classifier.py --datasets qnli qqp --finetune_mode ia3 \
        --enable_dp --target_epsilon 8.0 --clip_norm 0.1

To use several processes, launch it with torchrun or accelerate launch. Each task gets its own folder, model and privacy
budget. `--dry_run` prints epsilon, noise and steps, and stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.classification.arguments import CLASSIFIER_FLAGS, Settings
from utils.classification.arguments import CLASSIFIER_GROUPS as GROUPS
from utils.cli.flags import exit_on_invalid_argument, given_fields, parse

if TYPE_CHECKING:
    from accelerate import Accelerator


@exit_on_invalid_argument(*GROUPS, flags=CLASSIFIER_FLAGS)
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train on one task after another."""
    settings = Settings(*parse(*GROUPS, args=argv, description=__doc__))
    settings.refuse_unread(given_fields(argv, GROUPS))
    # Imported here, so that --help and a mistyped flag need neither torch nor transformers.
    from utils.cli.launch import make_accelerator

    accelerator = make_accelerator()
    run_tasks(settings, accelerator)
    accelerator.end_training()


def run_tasks(settings: Settings, accelerator: Accelerator) -> None:
    """Load and plan all tasks, then train. So a mistake in the last task is found before the first one is trained."""
    from dptune.averaging import describe_averaging
    from dptune.run.plan_lines import describe_needed_data, describe_plan, describe_register
    from utils.classification.data import load_tasks
    from utils.classification.files import load_classifier_tokenizer
    from utils.classification.plan import describe_passes, describe_setup, plan_task
    from utils.classification.run import is_finished, run_task
    from utils.classification.tasks import describe_task

    tokenizer = load_classifier_tokenizer(settings.checkpoint.model_name_or_path)
    planned = [plan_task(task, settings, tokenizer, accelerator) for task in load_tasks(settings, tokenizer)]
    finished, resumes = [], settings.results.resume_from_checkpoint is not None
    for one in planned:
        finished.append(is_finished(one, tokenizer, accelerator))
        passes = describe_passes(one, accelerator)
        average = describe_averaging(one.settings.steps.averaging, one.plan.steps)
        lines = [*describe_task(one.task), *describe_plan(one.plan), *average, *passes, *describe_setup(settings, one)]
        if not finished[-1]:
            lines += describe_register(one.plan, settings.folder / one.task.name, resumes=resumes)
        accelerator.print(*lines, sep="\n")
        if settings.results.dry_run and accelerator.is_main_process:
            for line in describe_needed_data(one.plan):
                print(line)
    for one, ended in zip(planned, finished, strict=True):
        if ended and not settings.results.dry_run:
            accelerator.print(f"already finished       {settings.folder / one.task.name}")
        elif not run_task(one, tokenizer, accelerator):
            return


if __name__ == "__main__":
    main()
