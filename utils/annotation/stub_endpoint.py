"""A local server with the chat completions route but no model, for demos and tests.

It says so in every answer, in the model's name, and in a header of every response.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MARK = "[stub answer]"
MODEL = "stub (no model)"
ROUTE, MODELS_ROUTE = "/v1/chat/completions", "/v1/models"
_REPEATED_WORDS = 12


class StubHandler(BaseHTTPRequestHandler):
    """Answers `POST /v1/chat/completions` and `GET /v1/models`."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as the client expects
    body = b""  # the body of the current request

    def do_POST(self) -> None:
        """Send a completion, or an error for an invalid request."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != ROUTE:
            self.send_json(404, _error(f"the only POST route is {ROUTE}", "not_found"))
            return
        instruction = last_user_message(self.body)
        if instruction is None:
            self.send_json(400, _error("the last message must be a user's text", "invalid_request"))
        else:
            self.reply(instruction)

    def do_GET(self) -> None:
        """Send the list of models."""
        if self.path == MODELS_ROUTE:
            self.send_json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self.send_json(404, _error(f"the only GET route is {MODELS_ROUTE}", "not_found"))

    def reply(self, instruction: str) -> None:
        """Answer one instruction; a test's server overrides it."""
        self.send_json(200, completion(instruction))

    def send_json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        """Send a JSON response."""
        self.send_body(status, json.dumps(content).encode(), headers)

    def send_body(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a response with any body."""
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Stub": "no model"}
        for name, value in (given | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: one line per request would bury the caller's output."""


class StubServer(ThreadingHTTPServer):
    """The server, reachable from this machine only.

    Args:
        port: port to listen on; 0 for any free port.
        handler: answers the requests.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, handler: type[StubHandler] = StubHandler) -> None:
        super().__init__(("127.0.0.1", port), handler)

    @property
    def base_url(self) -> str:
        """The client's base_url."""
        return f"http://127.0.0.1:{self.server_port}/v1"


def last_user_message(body: bytes) -> str | None:
    """The text to answer in a request's body; None if there is none."""
    try:
        content = json.loads(body)
        last = content["messages"][-1]
        text = last["content"] if last["role"] == "user" else None
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return text if isinstance(text, str) else None


def completion(instruction: str) -> dict[str, object]:
    """The response to an instruction, always the same; tokens are counted as words.

    >>> completion("Say hello.")["choices"][0]["message"]["content"]
    '[stub answer] No model wrote this. The instruction was: Say hello.'
    """
    words = instruction.split()
    text = f"{MARK} No model wrote this. The instruction was: {' '.join(words[:_REPEATED_WORDS])}"
    return {
        "id": "stub",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": len(words),
            "completion_tokens": len(text.split()),
            "total_tokens": len(words) + len(text.split()),
        },
    }


def _error(message: str, code: str) -> dict[str, object]:
    return {"error": {"message": message, "type": "stub_error", "code": code}}
