r"""Fine-tune a sentence classifier, privately or not, in one of nine ways (`--finetune_mode`).

    python train_classifier.py --datasets sst2 --finetune_mode full
    python train_classifier.py --datasets qnli qqp --finetune_mode ia3 \
        --enable_dp --target_epsilon 8.0 --max_grad_norm 0.1

Or behind torchrun or accelerate launch, on several processes. Each task gets a folder, a model and a privacy budget of
its own. `--dry_run` prints what a run would cost and stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.classification.arguments import CLASSIFIER_FLAGS, Settings
from utils.classification.arguments import CLASSIFIER_GROUPS as GROUPS
from utils.cli.flags import exit_on_invalid_argument, parse

if TYPE_CHECKING:
    from accelerate import Accelerator


@exit_on_invalid_argument(*GROUPS, flags=CLASSIFIER_FLAGS)
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train on one task after another."""
    settings = Settings(*parse(*GROUPS, args=argv, description=__doc__))
    # Here and not above: --help and a mistyped flag need neither torch nor transformers.
    from utils.cli.launch import make_accelerator

    accelerator = make_accelerator()
    run_tasks(settings, accelerator)
    accelerator.end_training()


def run_tasks(settings: Settings, accelerator: Accelerator) -> None:
    """Load and plan all tasks, so that a mistake in the last one is found before the first is trained; then train."""
    from dptune.run.plan import describe_plan
    from utils.classification.files import load_classifier_tokenizer
    from utils.classification.setup import describe_setup, is_finished, load_tasks, plan_task, run_task
    from utils.classification.tasks import describe_task

    tokenizer = load_classifier_tokenizer(settings.checkpoint.model_checkpoint)
    planned = [plan_task(task, settings, tokenizer, accelerator) for task in load_tasks(settings, tokenizer)]
    finished = []
    for one in planned:
        finished.append(is_finished(one, tokenizer, accelerator))
        accelerator.print(*describe_task(one.task), *describe_plan(one.plan), *describe_setup(settings), sep="\n")
    for one, ended in zip(planned, finished, strict=True):
        if ended and not settings.results.dry_run:
            accelerator.print(f"finished already       {settings.folder / one.task.name}")
        elif not run_task(one, tokenizer, accelerator):
            return


if __name__ == "__main__":
    main()
