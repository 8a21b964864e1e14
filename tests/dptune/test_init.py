"""`dptune` imports its names when they are first used, and type checkers see the same names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dptune

SOURCE = Path(dptune.__file__)


def test_python_and_type_checkers_see_the_same_names() -> None:
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == dptune._HOME_OF
    assert sorted(seen) == sorted(dptune.__all__)


@pytest.mark.parametrize("name", dptune.__all__)
def test_every_name_is_there(name: str) -> None:
    value = getattr(dptune, name)
    assert value.__name__ == name
    assert dptune.__dict__[name] is value  # the next use imports nothing
    assert name in dir(dptune)


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dptune' has no attribute 'PrivateStp'"):
        _ = dptune.PrivateStp  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'PrivateStp'"):
        exec("from dptune import PrivateStp")


def test_all_names_are_listed_and_torch_waits_for_the_first_that_needs_it() -> None:
    code = (
        "import sys, dptune, dptune.accounting, dptune.budget\n"
        "assert set(dptune.__all__) <= set(dir(dptune))\n"
        "slow = {'torch', 'dp_accounting', 'scipy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "from dptune import *\n"
        "assert 'torch' in sys.modules and PrivateStep.__module__ == 'dptune.step'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
