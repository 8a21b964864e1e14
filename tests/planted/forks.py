"""Runs tests of a copy of the tree in a fork of this process, which has imported the libraries already.

Importing torch, transformers and pytest takes about seven seconds, and most tests take less than one.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
GREEN, RED, HANGS = 0, 1, 124  # exit status, as those of pytest and of timeout
_LIBRARIES = ("torch", "accelerate", "datasets", "dp_accounting.pld.privacy_loss_distribution", "hypothesis", "peft")
_MORE_LIBRARIES = ("pytest", "scipy.special", "scipy.stats", "torch.distributed.fsdp", "transformers")
_OWN = ("dptune", "utils", "tests", "scripts", "benchmarks")
_CONTEXT = multiprocessing.get_context("fork")


def import_libraries() -> None:
    """Import what nearly every test imports, with one thread per process and without the network."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in (*_LIBRARIES, *_MORE_LIBRARIES):
        importlib.import_module(name)


@dataclass
class Run:
    """Tests that run in a process of their own, which leads a process group."""

    process: BaseProcess
    log: Path
    began: float
    limit: float

    @classmethod
    def start(cls, tree: Path, options: Sequence[str], log: Path, *, limit: float) -> Run:
        """Start pytest with `options` in `tree`. Its output goes to `log`; it has `limit` seconds."""
        process = _CONTEXT.Process(target=_run_pytest, args=(tree, tuple(options), log))
        process.start()
        return cls(process, log, time.monotonic(), limit)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.began

    def status(self) -> int | None:
        """pytest's exit status, HANGS, or None while it runs. What it left running is killed."""
        code = self.process.exitcode
        if code is None and self.seconds < self.limit:
            return None
        self.kill()
        return HANGS if code is None else code

    def kill(self) -> None:
        """End it and what it started."""
        if self.process.pid is not None:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # also before it leads a group
        self.process.join()


def _run_pytest(tree: Path, options: Sequence[str], log: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("w") as output, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(tree)
    _import_from(tree)
    _start_server_of_processes()
    import pytest

    status = int(pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *options]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread that a test left must not keep the process


def _import_from(tree: Path) -> None:
    """From now on this process, and those that it starts, import the project from `tree`."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(tree)
    importlib.invalidate_caches()


def _start_server_of_processes() -> None:
    """Fork the server that `tests.processes` uses. By itself Python would start a new interpreter, without libraries.

    If another version of Python starts its server in another way, then so be it: tests are slower, but the same.
    """
    multiprocessing.set_forkserver_preload([])
    with mock.patch("multiprocessing.util.spawnv_passfds", _forked):
        forkserver.ensure_running()


def _forked(_python: object, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Run the `-c` of `arguments` in a fork, as soon as somebody writes to one of the files in `kept`."""
    if pid := os.fork():
        return pid
    select.select(kept, [], [])
    with suppress(Exception):  # of a fault; the test that needs the module fails by it too
        for name in importlib.import_module("tests.processes").PRELOADED:
            importlib.import_module(name)
    exec(arguments[-1], {})
    os._exit(0)
