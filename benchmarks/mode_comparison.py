"""The result page of `compare_modes.sh`: the table and plot of `scripts/compare_modes.py`, with the machine.

    python -m benchmarks.mode_comparison --comparison OUT --output benchmarks/results/NAME.md

writes NAME.md, and the plot beside it as NAME.png.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from dptune._validate import refuse
from dptune.accounting.rounding import rounded_up
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.comparison.outcomes import COMPARISON_NAME, PLOT_NAME, SETTINGS_NAME


@dataclass
class ComparisonArguments:
    """Input and output."""

    comparison: str = field(metadata={"help": "folder of the comparison: the first argument of compare_modes.sh"})
    output: str = field(metadata={"help": "Markdown file for the result, such as benchmarks/results/NAME.md"})
    scored: int = field(default=872, metadata={"help": "number of rows in the validation split"})

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".md":
            refuse("--output", self.output, "give a file that ends in .md; the plot's name is made from it")


def describe_settings(settings: dict[str, Any], scored: int) -> str:
    """The settings that all trials share, without paths of this machine."""
    model = Path(settings["model_name_or_path"]).name
    delta = "the default delta" if settings["delta"] is None else f"delta {settings['delta']:g}"
    return (
        f"Made by `benchmarks/compare_modes.sh`: {model}, {settings['num_train_epochs']:g} epoch with batches of "
        f"{settings['batch_size']:,} on average, texts of up to {settings['block_size']} tokens, epsilon "
        f"{rounded_up(settings['target_epsilon'], trim=True)} at {delta}, "
        f"`{' '.join(settings['trainer'])}`. The standard error of an accuracy of 0.8 on {scored} rows is "
        f"{sqrt(0.8 * 0.2 / scored):.3f}."
    )


def main(args: ComparisonArguments) -> None:
    """Write the page."""
    folder, output = Path(args.comparison), Path(args.output)
    comparison = (folder / COMPARISON_NAME).read_text(encoding="utf-8")
    settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    plot = output.with_suffix(".png")
    parts = [
        "# Fine-tuning modes at one epsilon and without privacy",
        tables.machine("benchmarks.mode_comparison", torch.device("cpu"), sys.argv[1:]),
        describe_settings(settings, args.scored),
        f"![accuracy against trained parameters]({plot.name})",
        comparison[comparison.index("## ") :].strip(),
    ]
    tables.publish(parts, args.output)
    shutil.copyfile(folder / PLOT_NAME, plot)


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(ComparisonArguments, description=__doc__))
