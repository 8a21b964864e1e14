"""Work in several processes gives what one process gives, in order; errors come in their turn; nobody is left over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument, refuse
from utils.data import workers
from utils.data.workers import in_order, num_processors

ROOT = Path(__file__).parents[3]


def work(piece: int) -> tuple[int, int]:
    if piece == 31:
        refuse("--train_file", "x", "row 31 is bad")
    time.sleep(0.02 * (piece % 3 == 0))  # later pieces end earlier
    return piece * 2, os.getpid()


@pytest.fixture
def few_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_ALONE_FIRST", 2)


@pytest.mark.usefixtures("few_alone")
def test_results_come_in_order_and_the_pieces_are_read_only_a_little_ahead() -> None:
    read: list[int] = []

    def pieces() -> Iterator[int]:
        for piece in range(30):
            read.append(piece)
            yield piece

    found = []
    for result in in_order(pieces(), work, 2):
        found.append(result)
        assert len(read) <= len(found) + 2 * workers._AHEAD + 1
    assert [value for value, _ in found] == [2 * piece for piece in range(30)]
    processes = [process for _, process in found]
    assert set(processes[:2]) == {os.getpid()}
    assert os.getpid() not in processes[2:]
    assert 1 <= len(set(processes[2:])) <= 2


@pytest.mark.usefixtures("few_alone")
@pytest.mark.parametrize("count", [1, 2])
def test_an_error_comes_after_the_results_before_it(count: int) -> None:
    results = in_order(range(28, 40), work, count)
    assert [next(results)[0] for _ in range(3)] == [56, 58, 60]
    with pytest.raises(InvalidArgument, match=r"--train_file='x': row 31 is bad"):
        next(results)


def test_few_pieces_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("a process for so little"))
    pieces = range(40, 40 + workers._ALONE_FIRST)
    assert len(list(in_order(pieces, work, 8))) == workers._ALONE_FIRST
    assert num_processors() >= 1


def test_workers_without_work_end_when_the_process_that_started_them_is_killed() -> None:
    program = (
        "import os, signal\nfrom tests.utils.data.test_workers import work\nfrom utils.data import workers\n"
        "workers._ALONE_FIRST = 0\n"
        "if __name__ == '__main__':\n"
        "    for _, process in workers.in_order(range(1), work, 2):\n"
        "        print(process, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=120
    )
    worker = int(done.stdout)  # the pipe ends when the worker has ended too
    deadline = time.monotonic() + 10
    while _is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(worker)


def _is_alive(process: int) -> bool:
    try:
        return (Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except FileNotFoundError:
        return False
