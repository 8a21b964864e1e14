"""Imports go down only. Every import of the project is read from the source, including those in functions.

A new module needs a line in `TIERS`, where its author decides what it may import.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. A package name covers the modules in it; the same tier may import one another, without cycles.
TIERS: tuple[tuple[str, ...], ...] = (
    (
        "dptune._validate",
        "dptune._aliases",
        "dptune.command",
        "dptune.__main__",
        "dptune.attack",
        "dptune.plan",
        "dptune._files",
        "dptune._words",
        "dptune.averaging",
        "dptune.bands",
        "dptune.devices",
        "dptune.peft_format",
        "dptune.published",
        "dptune.keystream",
        "dptune.lora_targets",
        "dptune.clipping_styles",
        "dptune.accounting.groups",
        "dptune.accounting.rounding",
        "dptune.grid",
        "dptune.pass_overhead",
        "dptune.run.lock",
        "dptune.shapes",
        "dptune.units.columns",
        "dptune.units.names",
    ),
    ("dptune.accounting", "dptune.sampling", "dptune.noise", "dptune.correlated_noise", "dptune.randomness"),
    (
        "dptune.lora",
        "dptune.adapter_files",
        "dptune.per_example",
        "dptune.losses",
        "dptune.clipping",
        "dptune.iterate_average",
        "dptune.ledger",
        "dptune.micro_batch",
        "dptune.ranks",
        "dptune.sharding",
    ),
    ("dptune.mechanism",),
    (
        "dptune.flat",
        "dptune.fed_items",
        "dptune.sharded_sum",
        "dptune.step_sums",
        "dptune.step",
        "dptune.plain_step",
        "dptune.optimizers",
        "dptune.budget",
        "dptune.histogram",
        "dptune.report",
    ),
    ("dptune.units", "dptune.verify"),
    ("dptune.run",),
    ("dptune.audit",),
    ("dptune",),  # the re-exports, which no module of the engine uses
    ("dptune.integrations",),
    ("utils",),  # only its __init__
    ("utils.files", "utils.cli"),
    ("utils.data", "utils.models", "utils.annotation"),
    ("utils.training", "utils.generation", "utils.synthetic"),
    ("utils.classification", "utils.attacks", "utils.planning"),
    ("utils.comparison",),
    ("scripts",),  # every program: train_clm.py, inference_*.py, scripts/, benchmarks/
)
LIBRARIES_OF_INTEGRATIONS = {"transformers", "accelerate", "peft", "datasets"}
WITHOUT_TORCH = (
    "dptune.keystream",
    "dptune.accounting",
    "dptune.accounting.__main__",
    "dptune.accounting.data_needed",
    "dptune.accounting.meaning",
    "dptune.accounting.selection",
    "dptune.audit.bounds",
    "dptune.audit.one_run",
    "dptune.budget",
    "dptune.budget.__main__",
    "dptune.histogram",
    "dptune.accounting.groups",
    "dptune.accounting.rounding",
    "dptune.sampling",
    "dptune.grid",
    "dptune.averaging",
    "dptune.bands",
    "dptune.shapes",
    "dptune.clipping_styles",
    "dptune.mechanism",
    "dptune.run.noise_ratios",
    "dptune.run.plan",
    "dptune.run.plan_lines",
    "dptune.run.settings",
    "dptune.run.lock",
    "dptune.units.columns",
    "dptune.units.names",
    "utils.models.known_devices",
)

Sources = dict[str, ast.Module]  # module name -> its syntax tree
Graph = dict[str, set[str]]  # module name -> the project's modules and the libraries that it imports


def read_project(root: Path) -> Sources:
    """Every module of the project except the tests; all programs get the prefix `scripts.`, even `train_clm`."""
    engine = [*root.glob("dptune/**/*.py"), *root.glob("utils/**/*.py")]
    programs = [*root.glob("*.py"), *root.glob("scripts/**/*.py"), *root.glob("benchmarks/**/*.py")]
    names = {_module_name(path.relative_to(root)): path for path in [*engine, *programs]}
    return {
        name if path in engine or name.startswith("scripts.") else f"scripts.{name}": ast.parse(path.read_bytes())
        for name, path in names.items()
    }


def _module_name(path: Path) -> str:
    """`dptune/per_example/__init__.py` is dptune.per_example."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(name: str, tree: ast.Module, *, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports; `from a import b` gives a.b, since b may be a module."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import_call(node.func) and node.args:
            (target, *_) = node.args
            if name == "dptune":  # tests/dptune/test_init.py checks its table against imports that are read here
                continue
            assert isinstance(target, ast.Constant), f"{name}:{node.lineno} imports a name that cannot be read here"
            yield str(target.value)


def _is_import_call(function: ast.expr) -> bool:
    """`importlib.import_module(...)`, `import_module(...)` or `__import__(...)`."""
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    return called in {"import_module", "__import__"}


def import_graph(sources: Sources) -> Graph:
    """The targets of imports: the deepest module of the project that an import names, or the library's top name."""
    packages = {name.rpartition(".")[0] for name in sources} | {"dptune", "utils"}
    return {
        name: {
            resolved
            for target in imports_of(name, tree, is_package=name in packages)
            if (resolved := _resolve(target, sources)) != name
        }
        for name, tree in sources.items()
    }


def _resolve(target: str, sources: Sources) -> str:
    """`dptune.noise.Gaussian` is dptune.noise, `torch.nn` is torch; a program is found with or without its folder."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for known in (prefix, f"scripts.{prefix}", f"scripts.benchmarks.{prefix}"):
            if known in sources:
                return known
    return parts[0]


def tier(name: str) -> int | None:
    """The tier of a module of the project; None if it has none.

    Each module of the engine, and each package of `utils`, needs a separate entry.
    """
    candidates = [name]
    while "." in candidates[-1]:
        candidates.append(candidates[-1].rpartition(".")[0])
    for package in ("dptune", "utils"):  # each stands for its __init__ only
        if name.startswith(f"{package}."):
            candidates.remove(package)
    found = [index for candidate in candidates for index, members in enumerate(TIERS) if candidate in members]
    return found[0] if found else None  # the entry of the module itself comes before that of its package


def steps_up(graph: Graph) -> list[str]:
    """Imports of a higher tier, programs that import programs, and modules without a tier."""
    wrong = [f"{name} has no place in TIERS" for name in graph if tier(name) is None]
    for name, targets in graph.items():
        for target in sorted(targets & graph.keys()):
            here, there = tier(name), tier(target)
            if here is not None and there is not None and there > here:
                wrong.append(f"{name} imports {target}, which is above it")
            # Benchmarks may import a helper from each other, because there is no other place for one.
            private = name.startswith("scripts.benchmarks.") and target.startswith("scripts.benchmarks.")
            side = {".".join(module.split(".")[:2]) for module in (name, target) if module.startswith("utils.")}
            if len(side) == 2 and here == there:
                wrong.append(f"{name} imports {target}, a package beside its own")
            if name.startswith("scripts.") and target.startswith("scripts.") and not private:
                wrong.append(f"{name} imports {target}: a program imports no program")
    return wrong


def cycles(graph: Graph) -> list[str]:
    """The first import cycle, if there is one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def stray_libraries(graph: Graph) -> list[str]:
    """Imports of transformers and related libraries in the engine outside `integrations`."""
    engine = {n: t for n, t in graph.items() if n.startswith("dptune") and not n.startswith("dptune.integrations")}
    return [f"{name} imports {lib}" for name, t in engine.items() for lib in sorted(t & LIBRARIES_OF_INTEGRATIONS)]


def stray_torch(graph: Graph) -> list[str]:
    """Import paths to torch, also through other modules, from modules that must not import it."""
    wrong = []
    for name in WITHOUT_TORCH:
        reached, waiting = set(), [name]
        while waiting:
            module = waiting.pop()
            reached.add(module)
            waiting.extend(graph.get(module, set()) - reached)
        wrong.extend([f"{name} reaches torch"] if "torch" in reached else [])
    return wrong


Check = Callable[[Graph], list[str]]
CHECKS: tuple[Check, ...] = (steps_up, cycles, stray_libraries, stray_torch)


@pytest.mark.parametrize("check", CHECKS)
def test_the_project_keeps_its_order(check: Check) -> None:
    assert check(import_graph(read_project(ROOT))) == []


def test_all_of_the_project_is_read() -> None:
    names = read_project(ROOT).keys()
    assert {"dptune", "dptune._validate", "dptune.per_example", "utils", "scripts.prepare_demo"} <= names
    assert set(WITHOUT_TORCH) <= names


CLEAN = {
    "dptune/__init__.py": "from dptune.noise import draw",
    "dptune/_validate.py": "import math",
    "dptune/keystream.py": "import os",
    "dptune/accounting.py": "import dp_accounting",
    "dptune/sampling.py": "import numpy",
    "dptune/noise.py": "import torch\nfrom dptune import _validate",
    "dptune/per_example/__init__.py": "from .rules import linear",
    "dptune/per_example/hooks.py": "from . import rules\nfrom ..noise import draw",
    "dptune/per_example/rules.py": "import torch",
    "dptune/step.py": "from dptune.per_example import hooks",
    "dptune/integrations/__init__.py": "",
    "dptune/integrations/transformers.py": "import transformers\nfrom dptune import draw",
    "utils/__init__.py": "",
    "utils/data/load.py": "from dptune.step import take\nimport utils.data.prompts",
    "utils/data/prompts.py": "import transformers",
    "utils/training/loop.py": "from utils.data.load import rows",
    "utils/models/loading.py": "import transformers",
    "train_clm.py": "import dptune\nfrom utils.data import load",
    "scripts/plot.py": "from utils.data.prompts import style",
}


def judge_with(tmp_path: Path, **changed: str) -> list[str]:
    """Findings of all checks for the clean tree with some files replaced ('/' written as '__', no suffix)."""
    replaced = {f"{name.replace('__', '/')}.py": text for name, text in changed.items()}
    for name, text in (CLEAN | replaced).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = import_graph(read_project(tmp_path))
    return [complaint for check in CHECKS for complaint in check(graph)]


def test_a_clean_tree_has_no_complaints(tmp_path: Path) -> None:
    assert judge_with(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("dptune__noise", "import dptune.step", "dptune.noise imports dptune.step, which is above it"),
        ("dptune__noise", "from dptune import step", "dptune.noise imports dptune.step, which is above it"),
        (
            "dptune__noise",
            "def f():\n    from .step import take",
            "dptune.noise imports dptune.step, which is above it",
        ),
        ("dptune__noise", "from dptune import draw", "dptune.noise imports dptune, which is above it"),
        (
            "dptune__step",
            "import importlib\nimportlib.import_module('dptune.integrations.transformers')",
            "dptune.step imports dptune.integrations.transformers, which is above it",
        ),
        (
            "dptune__per_example__rules",
            "from .. import step",
            "dptune.per_example.rules imports dptune.step, which is above it",
        ),
        ("dptune__step", "import utils.data.load", "dptune.step imports utils.data.load, which is above it"),
        ("utils__data__load", "import train_clm", "utils.data.load imports scripts.train_clm, which is above it"),
        (
            "utils__data__load",
            "from utils.training import loop",
            "utils.data.load imports utils.training.loop, which is above it",
        ),
        (
            "utils__data__load",
            "def f():\n    import utils.models.loading",
            "utils.data.load imports utils.models.loading, a package beside its own",
        ),
        ("utils__loose", "import math", "utils.loose has no place in TIERS"),
        (
            "train_clm",
            "from scripts.plot import draw",
            "scripts.train_clm imports scripts.plot: a program imports no program",
        ),
        (
            "scripts__plot",
            "import train_clm",
            "scripts.plot imports scripts.train_clm: a program imports no program",
        ),
        (
            "benchmarks__speed",
            "from plot import draw",
            "scripts.benchmarks.speed imports scripts.plot: a program imports no program",
        ),
        ("dptune__novel", "import math", "dptune.novel has no place in TIERS"),
        ("dptune__step", "import accelerate.utils", "dptune.step imports accelerate"),
        ("dptune__noise", "if 0:\n    from transformers import Trainer", "dptune.noise imports transformers"),
        ("dptune__accounting", "import torch.nn", "dptune.accounting reaches torch"),
        ("dptune__sampling", "from dptune import noise", "dptune.sampling reaches torch"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, module: str, text: str, complaint: str) -> None:
    assert complaint in judge_with(tmp_path, **{module: text})


def test_a_planted_cycle_within_a_tier_is_found(tmp_path: Path) -> None:
    (ring,) = judge_with(tmp_path, utils__data__prompts="def f():\n    from utils.data import load")
    assert set(ring.split(" imports ")) == {"utils.data.load", "utils.data.prompts"}
