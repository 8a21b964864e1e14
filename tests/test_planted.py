"""The planted faults still fit the source, so that `make mutants` can run; a fault is caught or missed."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.planted.__main__ import rotated
from tests.planted.fault import Fault, planted
from tests.planted.faults import FAULTS
from tests.planted.records import Records
from tests.planted.sound import in_groups
from tests.planted.workers import hash_of_sources

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_source(fault: Fault) -> None:
    source = (ROOT / fault.file).read_text()
    tree = ast.parse(fault.applied(source))
    assert ast.dump(tree) != ast.dump(ast.parse(source)), "the fault changes nothing"
    for test in fault.tests:
        file, _, name = test.partition("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert not name or name.partition("[")[0] in functions, f"{test} is not there"


def test_names_are_unique() -> None:
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1


def fault(name: str, new: str, test: str = "test_module.py::test") -> Fault:
    """A fault of the small project that `run` makes."""
    return Fault(name, "module.py", "one = 1", new, (test,), "it would be two")


WRONG, HARMLESS = fault("wrong", "one = 2"), fault("harmless", "one = 1.0")


def test_a_fault_is_there_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("one = 1\n")
    compiled = tmp_path / "__pycache__" / "module.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.touch()
    with planted(WRONG, tmp_path):
        assert path.read_text() == "one = 2\n"
        assert not compiled.exists()
    assert path.read_text() == "one = 1\n"
    with pytest.raises(KeyError), planted(WRONG, tmp_path):
        raise KeyError
    assert path.read_text() == "one = 1\n"


def command(root: Path, *faults: Fault, flags: tuple[str, ...] = (), limit: float = 60.0) -> list[str]:
    """The program for a small project, which is made, without the libraries that its tests do not need."""
    (root / "module.py").write_text("one = 1\n")
    (root / "test_module.py").write_text(
        "import time\nfrom module import one\n\n\ndef test():\n    assert one == 1\n\n\n"
        "def test_slow():\n    time.sleep(0.1)\n    assert one == 1\n\n\ndef test_red():\n    assert one == 3\n"
    )
    program = (
        "import functools, sys, pytest\nfrom pathlib import Path\nfrom tests.planted import __main__ as program\n"
        "from tests.planted.fault import Fault\nprogram.import_libraries = lambda: __import__('hypothesis')\n"
        f"program.results = functools.partial(program.results, limit={limit})\n"
        "program.exit_on_sigterm()\n"
        f"raise SystemExit(program.main(sys.argv[2:], faults={list(faults)!r}, root=Path(sys.argv[1])))\n"
    )
    return [sys.executable, "-c", program, str(root), *flags]


def run(*args: Any, **how: Any) -> tuple[int, str]:
    """(exit status, output) of `command`."""
    ended = subprocess.run(command(*args, **how), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_missed_fault_is_told_and_verdicts_are_kept_until_a_source_changes(tmp_path: Path) -> None:
    status, output = run(tmp_path, WRONG, HARMLESS)
    assert (status, "| wrong | `module.py` | yes |" in output) == (1, True)
    assert "| harmless | `module.py` | **MISSED** |" in output
    assert "2 faults, 1 missed, " in output
    status, output = run(tmp_path, WRONG, HARMLESS, flags=("--output", str(tmp_path / "table.md")))
    assert (status, "| wrong |" in output) == (1, False)
    assert "2 faults, 1 missed, " in output
    table = (tmp_path / "table.md").read_text()
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["yes", "**MISSED**"]
    (tmp_path / "other.py").touch()
    status, output = run(tmp_path, WRONG, HARMLESS, flags=("--only", "wrong"))
    assert (status, "| wrong |" in output, "1 faults, 0 missed, " in output) == (0, True, True)
    _, output = run(tmp_path, WRONG, flags=("--fresh",))
    assert "| wrong |" in output


def test_a_test_that_hangs_has_not_caught_the_fault(tmp_path: Path) -> None:
    status, output = run(tmp_path, fault("waits", "import time\ntime.sleep(99)\none = 1"), limit=2.0)
    assert (status, "| waits | `module.py` | **MISSED** |" in output) == (1, True)


def test_a_program_that_is_ended_ends_the_tests_that_it_runs(tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.mkdir()
    text = f"import os, pathlib, time\npathlib.Path({str(told)!r}, str(os.getpid())).touch()\ntime.sleep(99)\none = 1"
    with subprocess.Popen(command(tmp_path, fault("waits", text)), cwd=ROOT, stdout=subprocess.DEVNULL) as program:
        end = time.monotonic() + 60
        while not (found := list(told.iterdir())):
            assert time.monotonic() < end, "the tests did not begin"
            time.sleep(0.05)
        program.terminate()
        assert program.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0].name), 0)


@pytest.mark.parametrize(
    ("one", "flags", "complaint"),
    [
        (Fault("gone", "module.py", "two", "three", (), ""), (), "gone: 'two' occurs 0 times"),
        (fault("proves nothing", "one = 2", "test_module.py::test_red"), (), "tests fail without a fault"),
        (fault("cannot run", "one = ("), (), "cannot run: pytest ended with"),
        (WRONG, ("--only", "right"), "no fault's name"),
        (WRONG, ("--seconds", "0"), "0 faults, 0 missed"),
    ],
    ids=lambda part: part.name if isinstance(part, Fault) else "",
)
def test_what_gives_no_verdict_has_an_exit_status_of_its_own(
    tmp_path: Path, one: Fault, flags: tuple[str, ...], complaint: str
) -> None:
    status, output = run(tmp_path, one, flags=flags)
    assert (status, complaint in output) == (2, True), output


def test_the_quickest_test_that_catches_a_fault_is_found(tmp_path: Path) -> None:
    status, output = run(tmp_path, fault("wrong", "one = 2", "test_module.py"), flags=("--find",))
    found = [line.split()[-1] for line in output.splitlines() if "test_module.py::" in line]
    assert status == 0
    assert sorted(found) == ["test_module.py::test", "test_module.py::test_red", "test_module.py::test_slow"]
    assert found[-1] == "test_module.py::test_slow"


def test_a_part_begins_with_what_changed_and_then_anywhere() -> None:
    faults = [Fault(str(number), f"{number}.py", "", "", (), "") for number in range(10)]
    firsts = {rotated(faults, f"{number:x}", [])[0].name for number in range(40)}
    assert len(firsts) == 10
    for number in (0, 5, 9):
        order = rotated(faults, f"{number:x}", ["3.py", "7.py"])
        assert {one.name for one in order[:2]} == {"3", "7"}
        assert {one.name for one in order} == {one.name for one in faults}


def test_a_new_fault_leaves_the_verdicts_of_others_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "tests" / "planted").mkdir(parents=True)
    (tmp_path / "tests" / "test_module.py").write_text("one = 1\n")
    before = hash_of_sources(tmp_path)
    (tmp_path / "tests" / "planted" / "step.py").touch()
    assert hash_of_sources(tmp_path) == before
    (tmp_path / "tests" / "test_module.py").write_text("one = 2\n")
    assert hash_of_sources(tmp_path) != before


def test_tests_that_need_a_process_of_their_own_get_one() -> None:
    groups = in_groups(["a.py::x", "a.py::y", "b.py", "tests/pretend/test_steps.py", "c.py"], 2)
    assert groups == [["a.py::x", "a.py::y", "c.py"], ["b.py"], ["tests/pretend/test_steps.py"]]


def test_a_verdict_holds_for_one_version_of_the_sources_and_of_the_fault(tmp_path: Path) -> None:
    Records(tmp_path, "a").note(WRONG, caught=True, seconds=2.5)
    Records(tmp_path, "a").note_sound(["test_module.py::test"])
    same, other = Records(tmp_path, "a"), Records(tmp_path, "b")
    assert (same.verdict(WRONG), other.verdict(WRONG)) == (True, None)
    assert same.verdict(fault("wrong", "one = 3")) is None
    assert (same.seconds(WRONG), other.seconds(WRONG), same.seconds(HARMLESS)) == (2.5, 2.5, 0.0)
    tests = ["test_module.py::test", "test_module.py", "test_module.py"]
    assert (same.unknown(tests), len(other.unknown(tests))) == (["test_module.py"], 2)
    assert Records(tmp_path, "a", fresh=True).verdict(WRONG) is None
