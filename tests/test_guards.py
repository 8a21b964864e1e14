"""Guards hold with every way to start Python: product code has no `assert`, which `python -O` removes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def product_files() -> list[Path]:
    """Every module that is not a test."""
    packages = (ROOT / name for name in ("dptune", "utils", "scripts", "benchmarks"))
    return [*ROOT.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]


def asserts(source: bytes) -> list[int]:
    """Lines of the `assert` statements in a module."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def test_product_code_has_no_assert() -> None:
    files = product_files()
    assert ROOT / "dptune" / "step.py" in files
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := asserts(path.read_bytes()))}
    assert found == {}


def test_an_assert_is_found_wherever_it_stands() -> None:
    assert asserts(b"def f(x):\n    if x:\n        assert x\n") == [3]


SETUP = """
import torch
from torch import nn
import dptune
from dptune.ledger import Ledger
from dptune.noise import GaussianNoise

class TooFew(GaussianNoise):
    def parts(self):
        for part in super().parts():
            yield part[:-1]

model = nn.Linear(3, 2, bias=False)
config = dptune.PrivacyConfig(num_examples=10, expected_batch_size=2, steps=3, clip_norm=1.0, noise_multiplier=1.0,
                              delta=1e-3)
"""
NOISE = """
ledger = Ledger(file)
with dptune.PrivateStep(model, config, ledger=ledger, noise=TooFew(6)) as step:
    step.backward(model(torch.ones(2, 3)).sum(1))
    try:
        step.finish()
    finally:
        told = f"{model.weight.grad} {ledger.steps}"
"""
RANKS = "from dptune.ranks import sum_over_ranks\nsum_over_ranks(torch.ones(3), world_size=2)"
SHARDS = "from dptune.sharding import ShardedBytes\nShardedBytes(held=61, total=100, root=10).require_bound(2)"
STATE = "dptune.PlainStep(model, 2.0).load_state_dict({'clip_norm': 1.0})"
LINES = "from dptune._files import append_line\nappend_line(file, 'one\\ntwo')"
VOTES = "import numpy as np\nfrom dptune.histogram import votes\nvotes(np.array([0, 1]), 2, units=['a', 'b', 'c'])"
GUARDED = {
    NOISE: "noise",
    RANKS: "gather",
    SHARDS: "bytes of weights",
    STATE: "state",
    LINES: "one line",
    VOTES: "units",
}
# Runs each of the sources by itself; prints the type and text of its error, and what it told.
RUN = """
import json, sys
setup, *guarded = json.loads(sys.argv[1])
found = []
for number, source in enumerate(guarded):
    names = {"file": f"{sys.argv[2]}/{number}"}
    try:
        exec(setup + source, names)
        found.append(("none", "", ""))
    except Exception as error:
        found.append((type(error).__name__, str(error), names.get("told", "")))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    """{source: the type and text of its error under `python -O`, and what it told}."""
    sources, folder = json.dumps([SETUP, *GUARDED]), tmp_path_factory.mktemp("guards")
    command = [sys.executable, "-O", "-c", RUN, sources, str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-500:]
    return dict(zip(GUARDED, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("guarded", GUARDED, ids=GUARDED.values())
def test_a_guard_holds_under_optimisation(guarded: str, refused: dict[str, tuple[str, str, str]]) -> None:
    kind, text, told = refused[guarded]
    assert kind in ("RuntimeError", "InvalidArgument")
    assert GUARDED[guarded] in text
    if guarded == NOISE:
        assert told == "None 0"  # no gradient, and no step is counted
