r"""Plan before training: a table of epsilon for given noise, or of the noise for a given epsilon.

    python -m dptune.accounting --num_examples 67349 --batch_size 256 512 1024 --epochs 1 3 10 --delta 1e-6 \
        --target_epsilon 8

The table has one row per batch size and one column per number of epochs. Each cell stands for a training run with these
settings and counts its steps. The program reads no data and trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from dptune._validate import (
    InvalidArgument,
    refuse,
    renamed,
    require_count,
    require_delta,
    require_positive,
)
from dptune.accounting import ACCOUNTANT, ADJACENCY, Cost, Cut, Spend, account, planned_steps
from dptune.accounting.data_needed import noise_if_any
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.accounting.rounding import rounded_up, rounded_up_to_figures
from dptune.bands import require_noise_bands

_OUT_OF_REACH = "-"
_MOST_STEPS = 1_000_000  # per cell: more than any training takes
_LEAST_NOISE = 0.1  # less means an epsilon of hundreds

Accountant = Callable[..., tuple[float | None, str]]  # (value, what gave it) for a sampling_probability and steps


@dataclass(frozen=True)
class Cell:
    """A possible run: `value` is its epsilon or its noise multiplier; None if no useful noise reaches the target.

    `accountant` is what gave it.
    """

    batch_size: int
    epochs: float
    steps: int
    sampling_probability: float
    value: float | None
    accountant: str = ACCOUNTANT


@dataclass(frozen=True)
class Table:
    """Cells by batch size (rows) and epochs (columns), the quantity that they show, and their common settings."""

    quantity: str
    given: str
    rows: list[list[Cell]]


def make_table(args: argparse.Namespace) -> Table:
    """Account for every pair of a batch size and a number of epochs.

    Raises:
        InvalidArgument: a setting outside its range, or a batch larger than the data set.
    """
    _check(args)
    delta = default_delta(args.num_examples) if args.delta is None else args.delta
    cut = None if args.max_batch is None else Cut(args.max_batch, args.num_examples)
    setting = {"delta": delta, "group_size": args.group_size, "cut": cut}
    if args.target_epsilon is None:
        quantity, given = "epsilon", f"at noise multiplier {args.noise_multiplier:g}"
        accountant: Accountant = partial(_cost, noise_multiplier=args.noise_multiplier, **setting)
    else:
        quantity, given = "noise multiplier", f"for epsilon {rounded_up(args.target_epsilon, trim=True)}"
        accountant = partial(_noise_if_any, target_epsilon=args.target_epsilon, **setting)
    rows = [
        [_cell(args.num_examples, batch, epochs, args.noise_bands, accountant) for epochs in args.epochs]
        for batch in args.batch_size
    ]
    unit = "" if args.group_size == 1 else f", {args.group_size} examples per privacy unit"
    unit += "" if cut is None else f", draws cut at {cut.max_batch:,}"
    unit += "" if args.noise_bands == 1 else f", {args.noise_bands} noise bands"
    told = f"delta {delta:g}" if args.delta is not None else delta_in_words(args.num_examples)
    return Table(quantity, f"{given}, {told}, {args.num_examples:,} examples{unit}", rows)


def _check(args: argparse.Namespace) -> None:
    require_count("--num_examples", args.num_examples)
    if args.delta is not None:
        require_delta(args.delta, args.num_examples, name="--delta")
    require_count("--group_size", args.group_size)
    if args.max_batch is not None:
        require_count("--max_batch", args.max_batch)
        if args.group_size > 1:
            refuse("--max_batch", args.max_batch, "draws cannot be cut with a --group_size above 1; leave one out")
    for flag, others in (("--group_size", args.group_size > 1), ("--max_batch", args.max_batch is not None)):
        if args.noise_bands > 1 and others:
            refuse("--noise_bands", args.noise_bands, f"does not go with {flag}; leave one out")
    for name in ("noise_multiplier", "target_epsilon"):
        if getattr(args, name) is not None:
            require_positive(f"--{name}", getattr(args, name))
    if args.noise_multiplier is not None and args.noise_multiplier < _LEAST_NOISE:
        refuse("--noise_multiplier", args.noise_multiplier, f"protects nobody; give at least {_LEAST_NOISE:g}")
    for epochs in args.epochs:
        require_positive("--epochs", epochs)
    for batch in args.batch_size:
        require_count("--batch_size", batch)
        if batch > args.num_examples:
            refuse("--batch_size", batch, f"must be at most the {args.num_examples} examples there are")
        if args.max_batch is not None and batch > args.max_batch:
            refuse("--batch_size", batch, f"must be at most --max_batch, {args.max_batch}, where draws are cut")
        with renamed({"noise_bands": "--noise_bands"}):
            require_noise_bands(args.noise_bands, batch / args.num_examples)
        if (steps := args.num_examples / batch * max(args.epochs)) > _MOST_STEPS:
            remedy = f"{steps:,.0f} steps with batches of {batch}; the maximum is {_MOST_STEPS:,}, so lower it"
            refuse("--epochs", max(args.epochs), remedy)


def _cell(num_examples: int, batch_size: int, epochs: float, noise_bands: int, accountant: Accountant) -> Cell:
    steps = planned_steps(num_examples=num_examples, expected_batch_size=batch_size, epochs=epochs)
    probability = batch_size / num_examples
    if noise_bands > steps:
        refuse("--noise_bands", noise_bands, f"must be at most the {steps} steps of batches of {batch_size}")
    spend = Spend(1.0, probability, steps).with_bands(noise_bands)
    found = accountant(sampling_probability=spend.sampling_probability, steps=spend.steps)
    return Cell(batch_size, epochs, steps, probability, *found)


def _cost(*, delta: float, **setting: Any) -> Cost:
    return account([Spend(**setting)], delta=delta)


def _noise_if_any(*, target_epsilon: float, **setting: Any) -> tuple[float | None, str]:
    """`noise_multiplier`, or None for a target that is out of reach, so that the other cells are still computed."""
    found = noise_if_any(target_epsilon=target_epsilon, **setting)
    if found is None:
        return None, ACCOUNTANT
    return found, _cost(noise_multiplier=found, **setting).accountant


def as_text(table: Table) -> str:
    """The table with aligned columns, for a terminal."""
    lines = _grid(table)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([_title(table), "", *body, *_notes(table)])


def as_markdown(table: Table) -> str:
    """A Markdown table under a line that says what it shows."""
    head, *body = _grid(table)
    lines = [head, ["---:"] * len(head), *body]
    notes = ["", *notes] if (notes := _notes(table)) else []
    return "\n".join([_title(table), "", *(f"| {' | '.join(line)} |" for line in lines), *notes])


def as_csv(table: Table) -> str:
    """One line per cell, with its steps and sampling probability; the value is empty if it is out of reach."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["batch_size", "epochs", "steps", "sampling_probability", table.quantity.replace(" ", "_")])
    for cell in (cell for row in table.rows for cell in row):
        value = "" if cell.value is None else repr(float(cell.value))
        writer.writerow([f"{cell.batch_size}", f"{cell.epochs:g}", cell.steps, cell.sampling_probability, value])
    return file.getvalue().rstrip("\n")


_WRITERS: dict[str, Callable[[Table], str]] = {"text": as_text, "markdown": as_markdown, "csv": as_csv}


def _title(table: Table) -> str:
    accountants = sorted({cell.accountant for row in table.rows for cell in row if cell.value is not None})
    return f"{table.quantity} {table.given}\n({'; '.join([ADJACENCY, *(accountants or [ACCOUNTANT])])})"


def _grid(table: Table) -> list[list[str]]:
    epochs = [f"{cell.epochs:g} epoch{'s' * (cell.epochs != 1)}" for cell in table.rows[0]]
    return [["batch size", *epochs], *([f"{row[0].batch_size}", *map(_shown, row)] for row in table.rows)]


def _shown(cell: Cell) -> str:
    """The value, rounded up, because a bound must stay a bound when it is shown."""
    return _OUT_OF_REACH if cell.value is None else rounded_up_to_figures(cell.value)


def _notes(table: Table) -> list[str]:
    if all(cell.value is not None for row in table.rows for cell in row):
        return []
    return [f"{_OUT_OF_REACH}: out of reach of any useful noise; try other batch sizes, epochs or epsilons"]


class _OneLineParser(argparse.ArgumentParser):
    """Prints only the mistake, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        _exit_with(f"{' '.join(message.split())} (--help lists the flags)")


def _exit_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def accounting_parser() -> argparse.ArgumentParser:
    """The parser of the program's flags."""
    flags = _OneLineParser(
        "python -m dptune.accounting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("--num_examples", type=int, required=True, help="size of the training set")
    flags.add_argument(
        "--batch_size",
        type=int,
        nargs="+",
        required=True,
        help="average batch size over all processes; one row each",
    )
    epochs = "number of epochs; one column each"
    flags.add_argument("--epochs", "--num_train_epochs", type=float, nargs="+", required=True, help=epochs)
    flags.add_argument(
        "--delta",
        type=float,
        help="probability with which the bound may fail (default: a tenth of 1/num_examples, rounded down to a power "
        "of ten)",
    )
    one = flags.add_mutually_exclusive_group(required=True)
    one.add_argument("--noise_multiplier", type=float, help="show the epsilon of this noise, over the clip norm")
    one.add_argument("--target_epsilon", type=float, help="show the noise multiplier that reaches this epsilon")
    flags.add_argument("--group_size", type=int, default=1, help="maximum examples per privacy unit (default 1)")
    flags.add_argument("--max_batch", type=int, help="cut draws at so many examples (default: draws are not cut)")
    bands = "correlate noise over so many steps, all of one launch (default 1: independent noise)"
    flags.add_argument("--noise_bands", type=int, default=1, help=bands)
    flags.add_argument(
        "--format", choices=_WRITERS, default="text", help="output format (default text); csv has one line per cell"
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table for the flags `argv`. A mistake prints one line and exits with status 2."""
    args = accounting_parser().parse_args(argv)
    try:
        print(_WRITERS[args.format](make_table(args)))
    except InvalidArgument as error:
        _exit_with(str(error))


if __name__ == "__main__":
    main()
