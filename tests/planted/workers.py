"""Runs tests with faults planted, several at a time, each in a copy of the tree of its own."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.planted.fault import Fault, planted
from tests.planted.forks import Run

_IGNORED = (".git", ".venv", ".*_cache", "__pycache__", "shared", "results", "*.egg-info", ".planted", "site")
_LIMIT, _POLL = 300.0, 0.02  # seconds


@dataclass(frozen=True)
class Task:
    """pytest's options, for the tree with a fault or for the sound one."""

    options: tuple[str, ...]
    fault: Fault | None = None


@dataclass(frozen=True)
class Result:
    """How a task ended: pytest's exit status or HANGS, its seconds, and the end of pytest's output."""

    task: Task
    status: int
    seconds: float
    output: str


def copy_tree(root: Path, target: Path) -> Path:
    """A copy of the working tree without what tests do not need."""
    return Path(shutil.copytree(root, target, ignore=shutil.ignore_patterns(*_IGNORED), symlinks=True))


def hash_of_sources(tree: Path) -> str:
    """SHA-256 over the Python files of a tree except this package: what decides which faults are caught."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*.py")):
        if not (name := path.relative_to(tree)).is_relative_to("tests/planted"):
            digest.update(f"{name}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def results(tasks: Iterable[Task], trees: Sequence[Path], *, limit: float = _LIMIT) -> Generator[Result]:
    """Each task's result, in the order in which they end; one task at a time in each of the trees.

    A task is taken from `tasks` only when a tree is free for it. Each has `limit` seconds. Close the generator to end
    those that run.
    """
    waiting = iter(tasks)
    running: dict[Path, tuple[Task, Run, ExitStack]] = {}
    try:
        while True:
            for tree in trees:
                if tree not in running and (task := next(waiting, None)) is not None:
                    running[tree] = _started(task, tree, limit)
            if not running:
                return
            for tree, (task, run, clean_up) in list(running.items()):
                if (status := run.status()) is not None:
                    del running[tree]
                    clean_up.close()
                    yield Result(task, status, run.seconds, run.log.read_text(errors="replace"))
            time.sleep(_POLL)
    finally:
        for _, run, clean_up in running.values():
            run.kill()
            clean_up.close()


def _started(task: Task, tree: Path, limit: float) -> tuple[Task, Run, ExitStack]:
    clean_up = ExitStack()
    if task.fault is not None:
        clean_up.enter_context(planted(task.fault, tree))
    return task, Run.start(tree, task.options, tree.with_suffix(".log"), limit=limit), clean_up
