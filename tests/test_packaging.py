"""What a new user gets: consistent dependency lists, an engine that installs on its own, a small clone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils.cli.settings_file import read_settings_file

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def by_name(lines: list[str]) -> dict[str, Requirement]:
    """{canonical name: requirement}; a duplicate name is an error."""
    requirements = [Requirement(line) for line in lines]
    named = {str(canonicalize_name(one.name)): one for one in requirements}
    assert len(named) == len(requirements), f"a name twice in {lines}"
    return named


IMPORTED_AS = {"scikit-learn": "sklearn", "pyyaml": "yaml"}


def pins() -> dict[str, Requirement]:
    """{name: requirement} of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return by_name([line for line in lines if line.strip() and not line.startswith("#")])


def disagreements(pinned: dict[str, Requirement], ranges: dict[str, Requirement]) -> list[str]:
    """Names in only one list, lines without a pinned version, and pins outside their range."""
    wrong = [f"{name} is in one list only" for name in sorted(pinned.keys() ^ ranges.keys())]
    for name in sorted(pinned.keys() & ranges.keys()):
        exact = [spec for spec in pinned[name].specifier if spec.operator == "=="]
        if len(exact) != 1:
            wrong.append(f"{name} is not pinned by ==")
        elif exact[0].version not in ranges[name].specifier:
            wrong.append(f"{pinned[name]} is outside {ranges[name]}")
    return wrong


def test_the_pins_satisfy_the_ranges() -> None:
    assert disagreements(pins(), by_name(PROJECT["dependencies"] + EXTRAS["scripts"])) == []


@pytest.mark.parametrize(
    ("pinned", "ranges", "complaint"),
    [
        (["a==1.0"], ["a>=1", "b"], "b is in one list only"),
        (["a==1.0", "b==2"], ["a>=1"], "b is in one list only"),
        (["A_b==1.0"], ["a-b>=1.5"], "A_b==1.0 is outside a-b>=1.5"),
        (["a>=1.0"], ["a"], "a is not pinned by =="),
    ],
)
def test_a_disagreement_is_found(pinned: list[str], ranges: list[str], complaint: str) -> None:
    assert disagreements(by_name(pinned), by_name(ranges)) == [complaint]


def test_the_tools_of_the_tests_are_pinned() -> None:
    for extra in ("test", "bench"):
        for name, requirement in by_name(EXTRAS[extra]).items():
            assert str(requirement.specifier).startswith("=="), f"{name} in [{extra}] is not pinned"


def third_party(path: Path) -> Iterator[str]:
    """Top names of a module's third-party imports, including those in functions."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        tops = {name.partition(".")[0] for name in names}
        yield from tops - sys.stdlib_module_names - {"dptune", "utils"}


def test_the_engine_imports_only_what_it_declares() -> None:
    declared = {name.replace("-", "_") for name in by_name(PROJECT["dependencies"])}
    engine = [path for path in (ROOT / "dptune").rglob("*.py") if "integrations" not in path.parts]
    assert {name for path in engine for name in third_party(path)} == declared


def test_the_scripts_import_only_what_is_pinned() -> None:
    declared = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in pins()}
    programs = [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("scripts/**/*.py")]
    optional = {"sentence_transformers", "faiss", "bitsandbytes"}  # extras, which users request by name
    assert {name for path in programs for name in third_party(path)} <= declared | optional


# Libraries that are not in the engine's list cannot be imported, even if the tests' environment has them.
IMPORT_ALONE = """
import importlib.abc, sys
hidden = set(sys.argv[2].split(","))
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)", name=name)
sys.meta_path.insert(0, Hide())
sys.path.insert(0, sys.argv[1])
import dptune
missing = [name for name in dptune.__all__ if not hasattr(dptune, name)]
assert not missing, missing
print(dptune.__file__)
"""


COPY = Path("dptune") / "_programs"  # where an installed package keeps the programs
SHIPPED = ("utils", "scripts", "accelerate_configs")  # besides the programs at the root


def package_sources() -> set[Path]:
    """What the package is built from, and more files of the root than belong into it."""
    folders = [path for name in ("dptune", *SHIPPED) for path in (ROOT / name).rglob("*")]
    files = [*folders, *ROOT.glob("*.*"), ROOT / "LICENSE", ROOT / "data" / "example_instructions.json"]
    return {path.relative_to(ROOT) for path in files if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only this package, installed by `pip install .` from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for path in package_sources():
        copy = source / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    command += ["--disable-pip-version-check", "--target", str(target), str(source)]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert pip.returncode == 0, pip.stderr[-2000:]
    return target


def test_the_installed_engine_imports_without_the_extras(installed: Path) -> None:
    needed = {name.replace("-", "_") for name in by_name(PROJECT["dependencies"])}
    extras = {name.replace("-", "_") for lines in EXTRAS.values() for name in by_name(lines)}
    hidden = ",".join(sorted((extras | {"utils"}) - needed - {"setuptools"}))
    command = [sys.executable, "-P", "-c", IMPORT_ALONE, str(installed), hidden]
    run = subprocess.run(command, cwd=installed.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert Path(run.stdout.strip()) == installed / "dptune" / "__init__.py"


def test_the_whole_engine_is_installed_and_nothing_else(installed: Path) -> None:
    """`bin` holds the command `dptune`. The programs pollute no namespace with a `utils` or a `scripts`."""
    top = {path.name for path in installed.iterdir()}
    assert top == {"dptune", f"dptune-{PROJECT['version']}.dist-info", "bin"}
    modules = {path.relative_to(installed) for path in installed.glob("dptune/**/*.py")}
    own = {path for path in modules if COPY.name not in path.parts}
    assert own == {path.relative_to(ROOT) for path in ROOT.glob("dptune/**/*.py")}, "a package is not in pyproject.toml"
    assert (installed / "dptune" / "py.typed").is_file(), "type checkers would ignore the engine's annotations"
    metadata = (installed / f"dptune-{PROJECT['version']}.dist-info" / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata


def test_the_programs_are_installed_with_what_they_read(installed: Path) -> None:
    sources = package_sources()
    programs = {path for path in sources if len(path.parts) == 1 and path.suffix == ".py"}
    wanted = programs | {path for path in sources if path.parts[0] in (*SHIPPED, "data")}
    found = {path.relative_to(installed / COPY) for path in (installed / COPY).rglob("*") if path.is_file()}
    assert {path for path in found if path.suffix != ".pyc"} == wanted
    assert {Path("train_clm.py"), Path("utils/synthetic/page.html.jinja"), Path("scripts/demo.sh")} <= found


def run_installed(installed: Path, cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The installed command in a folder outside of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(installed / "bin" / "dptune"), *map(str, words)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_installed_command_plans_trains_and_samples(installed: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("raise SystemExit('the wrong utils')")
    plan = run_installed(installed, tmp_path, *PLAN)
    assert plan.stdout.startswith("epsilon at noise multiplier 1, "), plan.stderr
    (tmp_path / "run.yaml").write_text(RUN.format(model=tiny_model_dir))
    (tmp_path / "my.jsonl").write_text('{"instruction": "Say a.", "answer": "a"}\n' * 8)
    line = ["train", "--config", "run.yaml", "--num_processes", 1, "--mixed_precision", "no"]
    train = run_installed(installed, tmp_path, *line)
    assert train.returncode == 0, train.stderr
    assert "privacy report         out/publish/privacy_report.json" in train.stdout
    settings, again = (read_settings_file(str(tmp_path / name)) for name in ("run.yaml", "out/config.yaml"))
    assert settings.items() <= again.items()
    (tmp_path / "ask.txt").write_text("Say b. #### 2\n")
    line = ["--model_name_or_path", tiny_model_dir, "--lora_weights_path", "out/publish", "--max_length", 20]
    sample = run_installed(
        installed, tmp_path, "sample", "--instruction_file", "ask.txt", *line, "--output_dir", "texts"
    )
    assert sample.returncode == 0, sample.stderr
    assert len((tmp_path / "texts" / "generations.jsonl").read_text().splitlines()) == 2


PLAN = ["epsilon", *(f"--{one}" for one in ("num_examples=1000", "batch_size=10", "epochs=1", "delta=1e-4"))]
PLAN.append("--noise_multiplier=1")
RUN = """
model_name_or_path: {model}
train_file: [my.jsonl]
output_dir: out
block_size: 32
per_device_train_batch_size: 4
max_train_steps: 1
noise_multiplier: 1.5
delta: 0.01
lora_r: 2
lora_target_modules: [q_proj, v_proj]
"""


def repository_files() -> list[Path]:
    """Files that git tracks or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of the repository's files")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_of_the_repository_is_over_1_mb() -> None:
    files = repository_files()
    assert ROOT / "pyproject.toml" in files
    assert [path for path in files if path.stat().st_size > 1_000_000] == []


# Where build machines keep things. A made-up /home/ann/ is a fair example in a docstring, this machine's home is not.
MACHINE_FOLDERS = {*(f"/{name}" for name in ("root", "work", "opt", "mnt")), str(ROOT), str(Path.home())} - {"/"}
MACHINE_PATH = re.compile(r"(?<![\w.$}~-])(?:" + "|".join(map(re.escape, sorted(MACHINE_FOLDERS))) + ")/")


def machine_paths(path: Path) -> list[str]:
    """Paths in a file that exist only on the author's machine."""
    return MACHINE_PATH.findall(path.read_text(encoding="utf-8", errors="replace"))


def test_no_file_of_the_repository_names_a_machine_path() -> None:
    assert {path.name: found for path in repository_files() if (found := machine_paths(path))} == {}


def test_a_machine_path_is_found(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    for folder in MACHINE_FOLDERS:
        file.write_text(f'open("{folder}/x.json")')
        assert machine_paths(file), folder
        file.write_text(f"#!/usr/bin/env bash\n$HERE{folder}/x forward{folder}/b https://example.org{folder}/")
        assert machine_paths(file) == [], folder
