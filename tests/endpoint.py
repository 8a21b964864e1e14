"""A real HTTP server that answers chat completions and misbehaves on demand, and remembers what it was asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from utils.annotation.stub_endpoint import StubHandler, StubServer, completion

Fault = Callable[[StubHandler], None]


class FaultyHandler(StubHandler):
    """Misbehaves as its server says, once per fault, then answers like the stub."""

    def reply(self, instruction: str) -> None:
        assert isinstance(self.server, FaultyServer)
        with self.server.under_way(instruction, self):
            fault = self.server.next_fault(instruction)
            time.sleep(self.server.delay)
            if fault is None:
                self.send_json(200, completion(instruction))
            else:
                fault(self)


class FaultyServer(StubServer):
    """Serves in a thread while entered.

    Args:
        faults: {instruction: what happens each time it is asked, in turn}; None is a normal answer.
        always: happens to every request without a remaining fault.
        delay: seconds before each response.
    """

    def __init__(
        self,
        faults: Mapping[str, Sequence[Fault | None]] | None = None,
        *,
        always: Fault | None = None,
        delay: float = 0.0,
    ) -> None:
        super().__init__(0, FaultyHandler)
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[Any] = []
        self.at: list[float] = []
        self.most_at_once = 0
        self.delay = delay
        self.always = always
        self._now = 0
        self._faults = {instruction: list(turns) for instruction, turns in (faults or {}).items()}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def counts(self) -> Counter[str]:
        """How often each instruction was asked."""
        return Counter(self.asked)

    def next_fault(self, instruction: str) -> Fault | None:
        with self._lock:
            turns = self._faults.get(instruction)
            return turns.pop(0) if turns else self.always

    @contextmanager
    def under_way(self, instruction: str, handler: StubHandler) -> Iterator[None]:
        with self._lock:
            self.asked.append(instruction)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.bodies.append(json.loads(handler.body))
            self.at.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed client is part of the test."""

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def rate_limit(seconds: float) -> Fault:
    """429 with a Retry-After."""
    return lambda handler: handler.send_json(429, {"error": {"code": "busy"}}, {"Retry-After": str(seconds)})


def status(number: int, message: str = "", code: str | None = None) -> Fault:
    """An error response."""
    return lambda handler: handler.send_json(number, {"error": {"message": message, "code": code}})


def hang(seconds: float) -> Fault:
    """Send no byte for this long."""
    return lambda _: time.sleep(seconds)


def drop(handler: StubHandler) -> None:
    """The connection ends before a response."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def drop_halfway(handler: StubHandler) -> None:
    """The connection ends in the middle of the body."""
    handler.send_body(200, b'{"choices": [', {"Content-Length": "1000"})
    handler.wfile.flush()
    drop(handler)


def body(content: bytes) -> Fault:
    """HTTP 200 with any body."""
    return lambda handler: handler.send_body(200, content)


def changed(**choice: Any) -> Fault:
    """A completion whose choice differs; `content` is the message's."""

    def send(handler: StubHandler) -> None:
        whole = completion("Say hello.")
        if "content" in choice:
            whole["choices"][0]["message"]["content"] = choice["content"]
        whole["choices"][0] |= {name: value for name, value in choice.items() if name != "content"}
        handler.send_json(200, whole)

    return send
