"""Stops that lose no work: the loop reads the first SIGTERM or SIGINT as a request; a second one ends the process."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2
# Ctrl-C reaches a worker twice, from the terminal and from the launcher; both are one request.
_SAME_REQUEST = 1.0


class StopRequest:
    """A context that records the first SIGTERM or SIGINT. Another signal more than a second later ends the process.

    Only the main thread of a process can enter it.

    Args:
        announce: whether to print the request to stderr; only the main process should.
        finishing: what is finished before the stop, as the message names it.
    """

    def __init__(self, *, announce: bool = True, finishing: str = "this micro-batch") -> None:
        self.name: str | None = None
        self._announce = announce
        self._finishing = finishing
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def pending(self) -> bool:
        """Whether this process was asked to stop."""
        return self.name is not None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._at = signal.Signals(number).name, now
            if self._announce:
                # Not through Python's buffer: a handler that interrupts a write to it gets a RuntimeError.
                told = f"{self.name}: stopping after {self._finishing} (signal again to stop at once)"
                os.write(_STDERR, f"\n{told}\n".encode())
        elif now - self._at > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
