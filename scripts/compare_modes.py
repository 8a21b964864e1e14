r"""Compare modes of fine-tuning a classifier at one epsilon, each with a few learning rates.

    python -m scripts.compare_modes --model_name_or_path PATH --datasets sst2 --data_dir glue --target_epsilon 8 \
        --modes full lora last-layer --learning_rates 1e-4 1e-3 --num_train_epochs 3 --output_dir OUT \
        -- --micro_batch_size 64

trains every mode at every rate with `train_classifier.py`, with privacy and without. It writes `OUT/comparison.md`,
`comparison.png` and `trials.jsonl`. After an interruption run the same line again to resume. A line with other modes,
rates, clip norms or seeds, and otherwise the same settings, adds its trials to the table. Flags after `--` are passed
to `train_classifier.py`.

Choosing by the scores of private runs costs privacy; the table says how much. With `--private_selection` a random
number of random trials runs instead, and only the best one is released: its model, mode, rate and noisy score go to
`OUT/selected/DATASET` (docs/how_to/choosing.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dptune.run.lock import FolderLock
from utils.cli.flags import exit_on_invalid_argument, given_fields, parse, refuse_unread
from utils.cli.launch_lines import split_at_dashes
from utils.comparison.arguments import ONLY_SELECTION, ChoiceArguments, TrialArguments, refuse_compared_flags
from utils.comparison.trials import Runner, run_in_process

if TYPE_CHECKING:
    from utils.comparison.run import Sizes

GROUPS = (TrialArguments, ChoiceArguments)
FLAGS = {"distribution": "--private_selection"}


def main(argv: Sequence[str] | None = None, *, runner: Runner = run_in_process, sizes: Sizes | None = None) -> None:
    """Compare, or select privately.

    Args:
        argv: the command line; `sys.argv[1:]` if None.
        runner: starts a training; tests replace it.
        sizes: returns the sizes of a data set; tests replace it.
    """
    own, extra = split_at_dashes(sys.argv[1:] if argv is None else argv)
    training, choice = parse(*GROUPS, args=own, description=__doc__)
    if choice.private_selection is None:
        remedy = "is not read without --private_selection: give that too, or leave it out"
        refuse_unread(given_fields(own, GROUPS), ONLY_SELECTION, remedy, choice)
    refuse_compared_flags(extra)
    from utils.comparison.folder import require_same_settings
    from utils.comparison.run import compare, count_records, select_privately

    folder = Path(training.output_dir)
    with FolderLock() as lock:  # otherwise two private selections could both draw, and one replace the other
        lock.make(folder)
        require_same_settings(folder, training, extra)
        if choice.private_selection is None:
            compare(folder, training, choice, extra, runner)
        else:
            for dataset in training.datasets:
                select_privately(folder, dataset, training, choice, extra, runner, sizes or count_records)


if __name__ == "__main__":
    with exit_on_invalid_argument(*GROUPS, flags=FLAGS):
        main()
