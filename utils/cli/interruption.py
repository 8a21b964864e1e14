"""A stop that loses nothing: the first SIGTERM or SIGINT is a request that the loop reads, the second ends it."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2
# Ctrl-C reaches a worker twice, from the terminal and from the launcher that passes it on: one request.
_SAME_REQUEST = 1.0


class StopRequest:
    """While entered, remembers the first SIGTERM or SIGINT; a second one, over a second later, acts as ever.

    Only the main thread of a process can enter it.

    Args:
        announce: whether to say so on stderr; the main process alone does.
        finishing: what is still finished, as that line names it.
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
                # Past Python's buffer: within a write to it, of a progress bar, a handler's own raises RuntimeError.
                os.write(_STDERR, f"\n{self.name}: stopping after {self._finishing} (again: at once)\n".encode())
        elif now - self._at > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
