"""The engine names its own parameters in errors; only programs know the names of flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PROGRAMS = (
    "__main__.py",
    "accounting/__main__.py",
    "audit/__main__.py",
    "budget/__init__.py",
    "budget/__main__.py",
    "budget/stages.py",
    "command.py",
    "verify.py",
)
_WRITES_COMMANDS = "report/recipe.py"
COMMAND_LINES = {ROOT / "dptune" / name for name in (*_PROGRAMS, _WRITES_COMMANDS)}
FLAG = re.compile(r"(?<![\w-])--[a-z]\w+")


def engine() -> list[Path]:
    """The engine's modules, except the integrations and the modules that are programs."""
    return [
        path
        for path in (ROOT / "dptune").rglob("*.py")
        if "integrations" not in path.parts and path not in COMMAND_LINES
    ]


def refused_names(tree: ast.Module) -> Iterator[str]:
    """The first arguments of `refuse` and `require_*` that are literals."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            first, called = node.args[0], node.func.id
            if (called == "refuse" or called.startswith("require_")) and isinstance(first, ast.Constant):
                yield str(first.value)


def names_of(tree: ast.Module) -> set[str]:
    """Names of a module's parameters and fields, and of its classes in lower case."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ClassDef):
            found.add(node.name.lower())
    return found


def test_no_flag_stands_in_the_engine() -> None:
    assert {path.name: found for path in engine() if (found := FLAG.findall(path.read_text(encoding="utf-8")))} == {}


def test_a_refusal_names_a_parameter_of_the_engine() -> None:
    trees = [ast.parse(path.read_bytes()) for path in engine()]
    known = set().union(*(names_of(tree) for tree in trees))
    refused = {name for tree in trees for name in refused_names(tree)}
    assert len(refused) > 20
    assert {name for name in refused if name.partition(".")[0] not in known} == set()


def test_a_flag_is_found() -> None:
    assert FLAG.findall("give `--seed`, --output_dir x, but a--b and --- or -- are none") == ["--seed", "--output_dir"]
