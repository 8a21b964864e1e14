"""What the tests of a fault say without it, and which tests say anything of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

from tests.planted.fault import Fault
from tests.planted.forks import GREEN
from tests.planted.records import Records
from tests.planted.workers import Task, results

_ALONE = "tests/pretend/"  # tests that need a process of their own
_LIMIT = 1800.0  # seconds


def red_without_a_fault(faults: Iterable[Fault], trees: Sequence[Path], records: Records) -> list[str]:
    """Run the faults' tests without a fault, except those known to be green; returns what pytest says of red ones."""
    unknown = records.unknown(test for fault in faults for test in fault.tests)
    tasks, said = (Task(("-q", *tests)) for tests in in_groups(unknown, len(trees))), []
    with closing(results(tasks, trees, limit=_LIMIT)) as found:
        for result in found:
            if result.status == GREEN:
                records.note_sound(result.task.options[1:])
            else:
                said.append(result.output)
    return said


def in_groups(tests: Sequence[str], count: int) -> list[list[str]]:
    """Tests that share a process: `count` groups of about as many files each, and those that must be alone."""
    alone = [test for test in tests if test.startswith(_ALONE)]
    files = sorted({test.partition("::")[0] for test in tests if test not in alone})
    groups = [[test for test in tests if test.partition("::")[0] in files[start::count]] for start in range(count)]
    return [group for group in (*groups, alone) if group]


def print_what_catches(faults: Sequence[Fault], trees: Sequence[Path]) -> None:
    """Plant each fault, run all its tests and print those that fail, the quickest first."""
    reports = {fault.name: trees[0].parent / f"{number}.xml" for number, fault in enumerate(faults)}
    options = ("-q", "-o", "junit_family=xunit1")
    tasks = (Task((*options, f"--junitxml={reports[one.name]}", *one.tests), one) for one in faults)
    with closing(results(tasks, trees, limit=_LIMIT)) as found:
        for result in found:
            if result.task.fault is not None:
                print(result.task.fault.name)
                for seconds, test in red_tests(reports[result.task.fault.name]):
                    print(f"{seconds:8.2f} s  {test}", flush=True)


def red_tests(report: Path) -> list[tuple[float, str]]:
    """(seconds, name) of the tests that failed in a JUnit report, the quickest first; none if there is no report."""
    if not report.exists():  # the tests were killed
        return []
    cases = ElementTree.parse(report).iter("testcase")
    red = (case for case in cases if case.find("failure") is not None or case.find("error") is not None)
    return sorted((float(case.get("time", 0)), f"{case.get('file')}::{case.get('name')}") for case in red)
