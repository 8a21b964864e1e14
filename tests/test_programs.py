"""Every program: --help imports no heavy library, every flag is read, every renamed parameter has a flag."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dptune._aliases import spellings

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "dp_accounting", "peft", "scipy", "sklearn", "openai"}
MODULES = ("dptune.accounting", "dptune.attack", "dptune.audit", "dptune.budget", "dptune.plan")
PATHS = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py"))]
SCRIPTS = sorted(".".join(path.with_suffix("").parts) for path in PATHS)
# Runs a program as `python -m` does and prints what it imported.
RUN = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
    print("\\nheavy:", *(%r & set(sys.modules)))
"""


@pytest.mark.parametrize("program", [*SCRIPTS, *MODULES])
def test_help_waits_for_no_heavy_library(program: str) -> None:
    command = [sys.executable, "-c", RUN % HEAVY, program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: ")
    assert run.stdout.splitlines()[-1].split() == ["heavy:"]


@pytest.mark.parametrize("module", ["utils.training.arguments", "utils.classification.arguments"])
def test_the_flags_of_training_wait_for_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*({HEAVY} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "\n"), run.stderr


def test_all_programs_are_found() -> None:
    assert {"train_clm", "inference_generation_dataset", "scripts.annotate", "scripts.nlg_reddit.fine_tune"} <= set(
        SCRIPTS
    )


def groups_of(program: str) -> list[type]:
    """The project's dataclasses of a program's flags."""
    module = importlib.import_module(program)
    if hasattr(module, "GROUPS"):
        return [group for group in module.GROUPS if not group.__module__.startswith("dptune.")]
    own = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == program]
    return [one for one in own if hasattr(one, "_argument_group_name")]


@pytest.mark.parametrize("program", SCRIPTS)
def test_renamed_parameters_have_a_flag_of_the_program(program: str) -> None:
    module = importlib.import_module(program)
    groups = getattr(module, "GROUPS", None) or groups_of(program)
    flags = {spelling for group in groups for one in dataclasses.fields(group) for spelling in spellings(one.name)}
    assert flags
    for renamed in (table for name, table in vars(module).items() if name.endswith("FLAGS")):
        assert set(renamed.values()) <= flags


def readers(module: ast.AST) -> Iterator[ast.AST]:
    """All code except functions that only check values."""
    for node in ast.iter_child_nodes(module):
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith(("__post_init__", "_check", "_require"))):
            yield node
            yield from readers(node)


def reads(module: ast.Module) -> Iterator[str]:
    """What a module reads from objects: attributes, names for `getattr`, and the argument of each `vars`.

    Names for `getattr` are the strings of a function that calls it, and of constants that such a function uses.
    """
    constants = {ast.unparse(one.targets[0]): one.value for one in module.body if isinstance(one, ast.Assign)}
    for node in readers(module):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "vars":
            yield ast.unparse(node)
        elif isinstance(node, ast.FunctionDef):
            used = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
            if "getattr" in used:
                for code in (node, *(value for name, value in constants.items() if name in used)):
                    yield from (str(one.value) for one in ast.walk(code) if isinstance(one, ast.Constant))


def read_names() -> set[str]:
    """Everything that the product's code reads."""
    paths = [path for folder in ("dptune", "utils", "scripts") for path in ROOT.glob(f"{folder}/**/*.py")]
    return {name for path in [*ROOT.glob("*.py"), *paths] for name in reads(ast.parse(path.read_bytes()))}


# Groups whose fields are the keyword arguments of a function, so that its signature reads them.
SPREAD = {"DataArguments": "vars(groups.data)", "ModeArguments": "vars(settings.mode)"}


def unread(groups: list[Any], names: set[str]) -> list[str]:
    """The fields that no code reads."""
    return [
        f"{group.__name__}.{one.name}"
        for group in groups
        for one in dataclasses.fields(group)
        if one.name not in names and SPREAD.get(group.__name__) not in names
    ]


def test_every_flag_is_read_somewhere() -> None:
    names = read_names()
    assert [flag for program in SCRIPTS for flag in unread(groups_of(program), names)] == []


def test_a_flag_that_is_only_checked_counts_as_unread() -> None:
    source = """
class Group:
    def __post_init__(self):
        require(self.checked)
    def name(self):
        self.written = 1
        return self.used, getattr(self, "by_name")
"""
    assert {"used", "by_name"} <= set(reads(ast.parse(source)))
    assert not {"checked", "written"} & set(reads(ast.parse(source)))

    @dataclasses.dataclass
    class Group:
        used: int
        checked: int

    assert unread([Group], set(reads(ast.parse(source)))) == ["Group.checked"]
