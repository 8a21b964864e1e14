"""A stand-in for an OpenAI-compatible server: real HTTP on 127.0.0.1, with texts that repeat the request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body

WEB_PAGE: Answer = (200, {"Content-Type": "text/html"}, b"<html>")


@dataclass
class CompletionServer:
    """What the server serves, and what it was asked.

    Attributes:
        models: the names that it lists; None for a web page.
        trouble: called with the number of a request from 0; what it returns is answered instead of a text.
        delay: seconds that a text takes.
        requests: bodies of the requests that were answered with a text.
        tokens: the bearer tokens that came.
        asked: number of requests, including those answered with trouble.
        at_once: maximum number of texts in work at the same time.
    """

    models: Sequence[str] | None = ("dptune",)
    trouble: Callable[[int], Answer | None] = lambda _number: None
    delay: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    at_once: int = 0
    asked: int = 0
    url: str = ""
    _in_work: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> Answer:
        """The answer to one request for a text."""
        with self._lock:
            number, self.asked, self._in_work = self.asked, self.asked + 1, self._in_work + 1
            self.at_once = max(self.at_once, self._in_work)
        try:
            if (trouble := self.trouble(number)) is not None:
                return trouble
            time.sleep(self.delay)
            with self._lock:
                self.requests.append(body)
            return as_json(completion(f" text of {body['seed']}"))
        finally:
            with self._lock:
                self._in_work -= 1


def completion(text: str | None, finish_reason: str | None = "stop") -> dict[str, Any]:
    """An answer in the API's format."""
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": "dptune"}
    return {**head, "choices": [choice], "usage": usage}


def as_json(content: object, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode()


@contextmanager
def running(server: CompletionServer) -> Iterator[CompletionServer]:
    """The server at a free port, until the block ends; its `url` is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            listed = [{"id": name, "object": "model"} for name in server.models or ()]
            self._send(WEB_PAGE if server.models is None else as_json({"object": "list", "data": listed}))

        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            self._send(server.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, answer: Answer) -> None:
            server.tokens.add(self.headers.get("Authorization", ""))
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            with suppress(BrokenPipeError):  # the client did not wait
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
