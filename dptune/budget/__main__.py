r"""Print what each stage of a budget file spent, who entered it, and the total; or make and edit a register.

    python -m dptune.budget budget.jsonl --delta 5e-7                    # what was spent
    python -m dptune.budget people.jsonl --limit 8 --delta 1e-6          # make a register, or change its limit
    python -m dptune.budget people.jsonl --add "survey 2025" 1.5 1e-7    # a release that was made elsewhere
    python -m dptune.budget people.jsonl --close my_run                  # give back the steps that it did not take

Give a training its register with --register people.jsonl. It is refused if it would exceed the limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dptune._validate import InvalidArgument, refuse
from dptune.budget import Budget

_DEFAULT_UNIT = "one training example"


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the flags ask, then print the epsilon of each stage of a budget file, and of all together."""
    parser = argparse.ArgumentParser(
        prog="python -m dptune.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("budget_file", help="the budget.jsonl of a pipeline, or a register")
    parser.add_argument(
        "--delta", type=float, help="probability with which the bound may fail. Default: the register's own"
    )
    parser.add_argument("--limit", type=float, metavar="EPSILON", help="make a register with this limit, or change it")
    parser.add_argument(
        "--add", nargs=3, metavar=("NAME", "EPSILON", "DELTA"), help="enter a release that was made elsewhere"
    )
    parser.add_argument("--unit", help=f"whom --add protects. Default: as the file, else {_DEFAULT_UNIT}")
    parser.add_argument("--close", metavar="NAME", help="count only the steps that a training took; it cannot resume")
    given = parser.parse_args(argv)
    try:
        print(*_lines(given), sep="\n")
    except InvalidArgument as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        told = f"{error.filename or given.budget_file} cannot be used; check the path and who may write it"
        print(f"error: {error.strerror}: {told}", file=sys.stderr)
        raise SystemExit(2) from None


def _lines(given: argparse.Namespace) -> list[str]:
    path = Path(given.budget_file)
    if path.is_dir():
        refuse("budget_file", given.budget_file, "is a folder; give a file")
    if not path.absolute().parent.is_dir():
        refuse("budget_file", given.budget_file, "its folder does not exist; make it first")
    if given.limit is None and not path.is_file():
        remedy = "there is no such file; give the budget.jsonl of a pipeline, or make a register with --limit"
        refuse("budget_file", given.budget_file, remedy)
    if given.unit is not None and given.add is None:
        refuse("--unit", given.unit, "is read only with --add; leave it out")
    if given.limit is not None and given.delta is None:
        refuse("--delta", None, "give it with --limit; a tenth of 1 / number of people is usual")
    budget = Budget(given.budget_file)
    if given.limit is not None:
        budget.set_limit(given.limit, given.delta)
    if given.add is not None:
        name, epsilon, delta = given.add
        budget.enter_stated(name, _number("--add", epsilon), _number("--add", delta), unit=_unit(given.unit, budget))
    if given.close is not None:
        budget.close(given.close)
    delta = given.delta if given.delta is not None or budget.limit is None else budget.limit.delta
    if delta is None:
        refuse("--delta", None, "give it: the file has no limit, whose delta would be the default")
    return budget.describe(delta)


def _unit(given: str | None, budget: Budget) -> str:
    return given or next((stage.unit for stage in budget.stages if stage.kind != "without privacy"), _DEFAULT_UNIT)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        refuse(name, text, "give a number")


if __name__ == "__main__":
    main()
