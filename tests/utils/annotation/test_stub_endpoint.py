"""The stub says that it is one, always alike, and turns wrong requests away."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from utils.annotation.stub_endpoint import MODEL, StubServer


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def send(url: str, content: object | None) -> tuple[int, Any, dict[str, str]]:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
            return response.status, json.loads(response.read()), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), dict(error.headers)


def user(content: object) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": content}]}


def test_an_answer_says_what_it_is_and_is_always_the_same(server: StubServer) -> None:
    number, first, headers = send(f"{server.base_url}/chat/completions", user("Größe? " * 20))
    assert number == 200
    text = first["choices"][0]["message"]["content"]
    assert text == "[stub answer] No model wrote this. The instruction was: " + " ".join(["Größe?"] * 12)
    assert first["model"] == MODEL == "stub (no model)"
    assert headers["X-Stub"] == "no model"
    assert first["usage"] == {"prompt_tokens": 20, "completion_tokens": 21, "total_tokens": 41}
    assert send(f"{server.base_url}/chat/completions", user("Größe? " * 20))[1] == first
    assert send(f"{server.base_url}/chat/completions", user("Länge?"))[1] != first


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        ("/chat/completions", {}, 400),
        ("/chat/completions", [], 400),
        ("/chat/completions", {"messages": []}, 400),
        ("/chat/completions", user(["part"]), 400),
        ("/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400),
        ("/completions", user("x"), 404),
        ("/other", None, 404),
        ("/models", None, 200),
    ],
)
def test_other_requests(server: StubServer, path: str, content: object, expected: int) -> None:
    number, answer, headers = send(f"{server.base_url}{path}", content)
    assert number == expected
    assert headers["X-Stub"] == "no model"
    assert answer["data"][0]["id"] == MODEL if expected == 200 else answer["error"]["type"] == "stub_error"


def test_it_is_reached_from_this_machine_only(server: StubServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
