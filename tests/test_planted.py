"""The planted faults still fit the source, so that `python -m tests.planted` can run; a fault is caught or missed."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.planted import FAULTS, ROOT, Fault, is_caught, plant


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_source(fault: Fault, tmp_path: Path) -> None:
    source = (ROOT / fault.file).read_text()
    (tmp_path / fault.file).parent.mkdir(parents=True)
    (tmp_path / fault.file).write_text(source)
    plant(fault, tmp_path)
    planted = (tmp_path / fault.file).read_text()
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source)), "the fault changes nothing, or cannot run"
    assert all((ROOT / test.partition("::")[0]).is_file() for test in fault.tests)


def test_names_are_unique() -> None:
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1


def test_a_text_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("one = 1\n")
    with pytest.raises(SystemExit, match="gone: 'two' occurs 0 times"):
        plant(Fault("gone", "module.py", "two", "three", (), ""), tmp_path)


@pytest.mark.parametrize(("new", "caught"), [("one = 2", True), ("one = 1.0", False)])
def test_a_red_test_is_caught_and_a_green_one_is_not(new: str, caught: bool, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("one = 1\n")
    (tmp_path / "test_module.py").write_text("from module import one\n\n\ndef test():\n    assert one == 1\n")
    fault = Fault("wrong", "module.py", "one = 1", new, ("test_module.py",), "")
    plant(fault, tmp_path)
    assert is_caught(fault, tmp_path) is caught


def test_tests_that_are_not_there_are_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pytest ended with"):
        is_caught(Fault("none", "", "", "", ("test_nothing.py",), ""), tmp_path)
