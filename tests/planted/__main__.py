r"""Plant faults that break privacy in silence, one at a time, and check that the tests named for each go red.

    python -m tests.planted                       # all of them
    python -m tests.planted --only noise ledger   # those whose names contain one of these words
    python -m tests.planted --seconds 90          # as many as fit, beginning at another one after each change
    python -m tests.planted --only "noise scaled" --find    # every test that catches it, the quickest first
    python -m tests.planted --output table.md     # also write the table

Some of them break no privacy but fail or are slow where there is an accelerator, which the CPU alone does not show:
`--only accelerator`.

Each fault is a change of one place in a temporary copy of the tree. Nothing crashes with it and every output looks as
before, so that only a test can tell. A fault that is `missed` is a gap in the tests. `tests/test_planted.py` checks in
every run of the suite that each fault still fits the source.

Verdicts are kept in `.planted`. A run that was stopped goes on where it was, unless a Python file has changed. The exit
status is 1 if a fault was missed, and 2 if one does not fit the source or its tests do not pass without it.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.planted.fault import Fault
from tests.planted.faults import FAULTS
from tests.planted.forks import GREEN, HANGS, RED, ROOT, import_libraries
from tests.planted.records import Records
from tests.planted.sound import print_what_catches, red_without_a_fault
from tests.planted.workers import Result, Task, copy_tree, hash_of_sources, results

_ALL_CAUGHT, _MISSED, _NO_VERDICT = 0, 1, 2  # exit status
_HEAD = "| fault | place | caught | seconds |\n| --- | --- | --- | ---: |"


class NoVerdict(Exception):
    """Faults, or their tests, are not fit to say anything."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m tests.planted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="words, one of which a fault's name must contain")
    parser.add_argument("--output", type=Path, help="file for the table. Default: print it only")
    parser.add_argument("--workers", type=int, default=cores, help=f"faults at a time. Default: the cores, {cores}")
    parser.add_argument("--fresh", action="store_true", help="try those again whose verdicts are known")
    parser.add_argument(
        "--seconds",
        type=float,
        help="begin no fault after so many seconds, and do not run the tests without a fault first. Faults in files "
        "that the last commit changed come first, then all from a place that the sources decide. Default: try all",
    )
    parser.add_argument("--find", action="store_true", help="print every test that catches a fault, the quickest first")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give at least 1")
    return args


def main(argv: Sequence[str] | None = None, *, faults: Sequence[Fault] = FAULTS, root: Path = ROOT) -> int:
    """Plant each of `faults` in copies of `root`, run its tests and print a table; returns the exit status."""
    began, args = time.monotonic(), parse(argv)
    try:
        chosen = fitting([one for one in faults if any(word in one.name for word in args.only)], root)
        import_libraries()
        with TemporaryDirectory() as folder:
            trees = [copy_tree(root, Path(folder) / f"tree{number}") for number in range(args.workers)]
            if args.find:
                print_what_catches(chosen, trees)
                return _ALL_CAUGHT
            sources = hash_of_sources(trees[0])
            records = Records(root / ".planted", sources, fresh=args.fresh)
            if args.seconds is None:
                require_sound(chosen, trees, records)
                order = sorted(chosen, key=records.seconds, reverse=True)  # so that no long one is left at the end
                try_all(order, trees, records)
            else:
                try_all(rotated(chosen, sources, changed_files(root)), trees, records, until=began + args.seconds)
    except NoVerdict as error:
        print(error)
        return _NO_VERDICT
    return told(chosen, records, time.monotonic() - began, args.output)


def fitting(faults: Sequence[Fault], root: Path) -> Sequence[Fault]:
    """The faults. Raises `NoVerdict` if there is none, or if one does not fit the source."""
    problems = [] if faults else ["no fault's name has one of the words of --only"]
    for fault in faults:
        try:
            fault.applied((root / fault.file).read_text())
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise NoVerdict("\n".join(problems))
    return faults


def require_sound(faults: Sequence[Fault], trees: Sequence[Path], records: Records) -> None:
    """Run the faults' tests without a fault; a test that fails then proves nothing."""
    if said := red_without_a_fault(faults, trees, records):
        raise NoVerdict("\n".join([*said, "tests fail without a fault, so that they prove nothing"]))


def changed_files(root: Path) -> list[str]:
    """Files that the last commit, or a change after it, changed; none where no earlier commit is known."""
    command = ["git", "diff", "--name-only", "HEAD~1"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:  # no git
        return []


def rotated(faults: Sequence[Fault], sources: str, changed: Sequence[str]) -> list[Fault]:
    """Those in files that have changed, then all others from a place on that the hash of the sources decides."""
    start = int(sources, 16) % len(faults)
    return sorted([*faults[start:], *faults[:start]], key=lambda fault: fault.file not in changed)


def try_all(faults: Iterable[Fault], trees: Sequence[Path], records: Records, *, until: float = math.inf) -> None:
    """Find the verdicts that are not known, print them and keep them. None is begun after the time `until`."""
    tasks = (Task(("-x", "-q", *one.tests), one) for one in faults if records.verdict(one) is None)
    print(_HEAD, flush=True)
    with closing(results(takewhile(lambda _: time.monotonic() < until, tasks), trees)) as found:
        for result in found:
            if (fault := result.task.fault) is not None:
                records.note(fault, caught=is_red(fault, result), seconds=result.seconds)
                print(row(fault, records), flush=True)


def is_red(fault: Fault, result: Result) -> bool:
    """Whether a test went red. A test that hangs did not. Raises `NoVerdict` if pytest could not run the tests."""
    if result.status not in (GREEN, RED, HANGS) or "error during collection" in result.output:
        raise NoVerdict(f"{fault.name}: pytest ended with {result.status}\n{result.output[-3000:]}")
    return result.status == RED


def row(fault: Fault, records: Records) -> str:
    """A fault's line of the table."""
    verdict = "yes" if records.verdict(fault) else "**MISSED**"
    return f"| {fault.name} | `{fault.file}` | {verdict} | {records.seconds(fault):.0f} |"


def told(chosen: Sequence[Fault], records: Records, seconds: float, output: Path | None) -> int:
    """Print the result, write the table and return the exit status."""
    tried = [one for one in chosen if records.verdict(one) is not None]
    missed = [one for one in tried if not records.verdict(one)]
    for one in missed:
        print(f"missed: {one.name} ({', '.join(one.tests)}): {one.why}")
    print(f"{len(tried)} faults, {len(missed)} missed, {seconds:.0f} seconds")
    if output is not None:
        output.write_text("\n".join([_HEAD, *(row(one, records) for one in tried)]) + "\n")
    if not tried:
        return _NO_VERDICT
    return _MISSED if missed else _ALL_CAUGHT


def exit_on_sigterm() -> None:
    """Let SIGTERM end the program like an error: what it started ends too, and its folder is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    exit_on_sigterm()
    raise SystemExit(main())
