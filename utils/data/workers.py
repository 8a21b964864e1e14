"""Does the same work on many pieces in several processes, and gives the results in order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

P = TypeVar("P")
R = TypeVar("R")

_ALONE_FIRST = 20  # pieces that this process does before it starts others: they take seconds to begin
_AHEAD = 3  # pieces per process that are under way or done, so that none waits and memory has a bound


def num_processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(pieces: Iterable[P], work: Callable[[P], R], workers: int) -> Iterator[R]:
    """`work` of each piece, in order. The first pieces are done here; if there are more, by `workers` processes.

    Args:
        pieces: are read one by one, only a few more than are done.
        work: can be pickled, and so can pieces and results. It depends on nothing else in this process.
        workers: number of processes; below 2 all is done here.

    Raises:
        Exception: what `work` raised for a piece, after the results of all pieces before it.
    """
    left = iter(pieces)
    yield from map(work, islice(left, _ALONE_FIRST))
    following = next(left, None)
    if following is None:
        return
    left = chain([following], left)
    if workers < 2:
        yield from map(work, left)
        return
    # Not forked: this process has threads of torch and of tokenizers, and perhaps a device.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(work,))
    try:
        begun: deque[Future[R]] = deque()
        for piece in left:
            begun.append(pool.submit(_do, piece))
            if len(begun) >= workers * _AHEAD:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_work: list[Callable[[Any], Any]] = []  # in a worker: what it does


def _begin(work: Callable[[Any], Any]) -> None:
    """Prepare a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers together already use every processor
    _work.append(work)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent was killed; it would wait for pieces forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _do(piece: Any) -> Any:
    return _work[0](piece)
