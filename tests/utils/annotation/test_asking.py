"""Questions put to a real server that limits, fails, hangs and drops: what is retried, set aside, or ends the run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from dptune._validate import InvalidArgument
from tests.endpoint import (
    Fault,
    FaultyServer,
    body,
    changed,
    drop,
    drop_halfway,
    hang,
    rate_limit,
    status,
)
from utils.annotation.asking import Asking, Endpoint, Failure
from utils.annotation.files import Question, make_questions
from utils.annotation.replies import Reply
from utils.annotation.stub_endpoint import MARK, StubHandler, completion
from utils.cli.endpoints import OPENAI_KEY, key_from_environment

KEY = "sk-4711-not-to-be-seen"


def ask_one(server: FaultyServer, instruction: str = "q", *, timeout: float = 5.0, max_retries: int = 2) -> Reply:
    """One question through the client, which is closed afterwards."""

    async def ask() -> Reply:
        endpoint = Endpoint(server.base_url, KEY, {"model": "m"}, timeout=timeout, max_retries=max_retries)
        try:
            return await endpoint.ask(instruction)
        finally:
            await endpoint.close()

    return asyncio.run(ask())


class Answers:
    """What `Asking` reports."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.replies: dict[str, Reply] = {}

    def reasons(self) -> dict[str, str | None]:
        return {name: reply.reason for name, reply in self.replies.items() if reply.answer is None}


def ask_all(
    server: FaultyServer,
    names: Sequence[str],
    *,
    concurrency: int = 4,
    max_retries: int = 0,
    key: str | None = KEY,
    most: int | None = None,
    answers: Answers | None = None,
) -> Answers:
    """All questions; `most` stops after so many answers. `answers` is filled in, for runs that end by an error."""
    answers = Answers() if answers is None else answers
    questions = make_questions([{"id": name, "instruction": name} for name in names], {})

    def answered(question: Question, reply: Reply) -> None:
        name = question.instruction
        assert name not in answers.replies, "answered twice"
        answers.order.append(name)
        answers.replies[name] = reply

    async def run() -> None:
        endpoint = Endpoint(server.base_url, key, {"model": "m"}, timeout=5.0, max_retries=max_retries)
        stopping = (lambda: False) if most is None else (lambda: len(answers.order) >= most)
        try:
            await Asking(endpoint, questions, answered, max_concurrency=concurrency, stopping=stopping).run()
        finally:
            await endpoint.close()

    asyncio.run(run())
    return answers


@pytest.mark.parametrize("fault", [status(500), status(503), status(408), drop, drop_halfway, hang(1.0)])
def test_what_may_pass_is_asked_again(fault: Fault) -> None:
    with FaultyServer({"q": [fault]}) as server:
        reply = ask_one(server, timeout=0.5)
    assert reply.answer is not None
    assert reply.answer.startswith(MARK)
    assert server.counts == {"q": 2}
    assert 0.3 < server.at[1] - server.at[0] < 3, "waits about half a second, not for ever"


def test_waits_grow_until_the_attempts_are_used_up() -> None:
    with FaultyServer({"q": [status(500)] * 9}) as server, pytest.raises(Failure, match="HTTP 500"):
        ask_one(server)
    first, second = (later - earlier for earlier, later in zip(server.at, server.at[1:], strict=False))
    assert server.counts == {"q": 3}
    assert 0.35 < first < second


def test_the_endpoint_says_how_long_to_wait() -> None:
    with FaultyServer({"q": [rate_limit(1.5), rate_limit(0.01)]}) as server:
        assert ask_one(server).answer is not None
    first, second = (later - earlier for earlier, later in zip(server.at, server.at[1:], strict=False))
    assert first >= 1.5
    assert second < 0.35, "Retry-After is taken below the usual wait, too"


@pytest.mark.parametrize("number", [400, 401, 403, 404, 422])
def test_what_will_not_pass_is_asked_once(number: int) -> None:
    with FaultyServer({"q": [status(number)]}) as server, pytest.raises(Failure, match=f"HTTP {number}"):
        ask_one(server)
    assert server.counts == {"q": 1}


def test_a_trickle_of_bytes_comes_to_an_end() -> None:
    def trickle(handler: StubHandler) -> None:
        handler.send_body(200, b" ", {"Content-Length": "1000"})
        for _ in range(40):
            time.sleep(0.1)
            handler.wfile.write(b" ")

    with FaultyServer({"q": [trickle]}) as server:
        begun = time.monotonic()
        with pytest.raises(Failure, match="timed out"):
            ask_one(server, timeout=0.5, max_retries=0)
        took = time.monotonic() - begun
    assert took < 3, "the server sends for four seconds"


def test_no_more_are_under_way_than_allowed() -> None:
    with FaultyServer(delay=0.05) as server:
        answers = ask_all(server, [f"q{i}" for i in range(20)], concurrency=3)
    assert len(answers.replies) == 20
    assert server.most_at_once == 3


def test_the_key_goes_to_the_endpoint_and_a_placeholder_where_there_is_none() -> None:
    with FaultyServer() as server:
        ask_all(server, ["a"])
        ask_all(server, ["b"], key=None)
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {KEY}", "Bearer none"]


def test_one_bad_row_is_set_aside_and_the_others_are_answered() -> None:
    faults = {"b": [status(500)], "c": [status(400, code="context_length_exceeded")], "d": [body(b"<html>")]}
    with FaultyServer({**faults, "e": [changed(finish_reason="length")], "f": [drop]}) as server:
        answers = ask_all(server, list("abcdefgh"))
    assert answers.reasons() == {
        "b": "HTTP 500",
        "c": "HTTP 400 (context_length_exceeded)",
        "d": "the body is not JSON",
        "e": "cut off at the token limit (finish_reason length)",
        "f": "the connection was dropped",
    }
    assert set(answers.replies) == set("abcdefgh")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (400, "check --model, --max_tokens"),
        (401, "OPENAI_API_KEY is not accepted"),
        (403, "is not allowed to use this model"),
        (404, "no such route or model"),
        (422, "remove the row with id 'q0'"),
    ],
)
def test_what_the_first_request_is_refused_for_ends_the_run(number: int, remedy: str) -> None:
    quoting = f"{KEY} may not ask q0"
    with (
        FaultyServer(always=status(number, quoting, code=KEY)) as server,
        pytest.raises(InvalidArgument, match=remedy) as caught,
    ):
        ask_all(server, [f"q{i}" for i in range(30)], max_retries=3)
    assert server.asked == ["q0"], "one request, and no other"
    message = str(caught.value)
    assert f"--base_url='{server.base_url}': HTTP {number}: " in message
    assert KEY not in message
    assert "\n" not in message
    assert caught.value.__cause__ is None, "a traceback would show the endpoint's words"


def test_without_a_key_the_remedy_is_to_set_one() -> None:
    with FaultyServer(always=status(401)) as server, pytest.raises(InvalidArgument, match="needs a key; set"):
        ask_all(server, ["q"], key=None)


def test_a_key_that_ends_in_the_middle_ends_the_run_and_sets_nothing_aside() -> None:
    answers, names = Answers(), [f"q{i}" for i in range(60)]
    with (
        FaultyServer({name: [status(401)] for name in names[10:]}) as server,
        pytest.raises(InvalidArgument, match="OPENAI_API_KEY"),
    ):
        ask_all(server, names, answers=answers)
    assert server.counts.total() < 18
    assert set(answers.replies) == set(names[:10])
    assert answers.reasons() == {}


def test_an_endpoint_that_goes_down_ends_the_run_and_sets_nothing_aside() -> None:
    answers, names = Answers(), [f"q{i}" for i in range(200)]
    told = r"no usable answer 1\d times in a row; last reason: HTTP 503"
    with (
        FaultyServer({name: [status(503)] for name in names[20:]}) as server,
        pytest.raises(InvalidArgument, match=told),
    ):
        ask_all(server, names, answers=answers)
    assert server.counts.total() < 40
    assert set(answers.replies) == set(names[:20])
    assert answers.reasons() == {}


def test_an_endpoint_that_goes_down_at_the_end_sets_nothing_aside() -> None:
    answers, names = Answers(), [f"q{i}" for i in range(20)]
    with (
        FaultyServer({name: [None] for name in names[:15]}, always=status(503)) as server,
        pytest.raises(
            InvalidArgument, match=r"no answer for the last 5 rows \(HTTP 503\); .*the same line again to resume"
        ),
    ):
        ask_all(server, names, answers=answers)
    assert set(answers.replies) == set(names[:15])
    assert answers.reasons() == {}


def test_last_rows_that_fail_by_themselves_are_set_aside() -> None:
    with FaultyServer({name: [status(500)] for name in ("q8", "q9")}) as server:
        answers = ask_all(server, [f"q{i}" for i in range(10)])
    assert answers.reasons() == {"q8": "HTTP 500", "q9": "HTTP 500"}


def test_an_answer_on_its_way_when_the_endpoint_went_down_proves_nothing() -> None:
    def late(handler: StubHandler) -> None:
        time.sleep(0.4)
        handler.send_json(200, completion("late"))

    answers, names = Answers(), [f"q{i}" for i in range(60)]
    faults = {"q1": [late], **{name: [status(503)] for name in names[2:]}}
    with FaultyServer(faults, delay=0.05) as server, pytest.raises(InvalidArgument, match="HTTP 503"):
        ask_all(server, names, concurrency=2, answers=answers)
    assert set(answers.replies) == {"q0", "q1"}


def test_garbage_without_end_ends_the_run() -> None:
    with FaultyServer(always=body(b"<html>")) as server, pytest.raises(InvalidArgument, match="the body is not JSON"):
        ask_all(server, [f"q{i}" for i in range(200)])
    assert server.counts.total() < 20


def test_a_first_row_that_fails_by_itself_does_not_end_the_run() -> None:
    with FaultyServer({"q0": [status(500)]}) as server:
        answers = ask_all(server, ["q0", "q1", "q2"])
    assert answers.reasons() == {"q0": "HTTP 500"}
    assert set(answers.replies) == {"q0", "q1", "q2"}


def test_an_endpoint_that_never_answers_sets_nothing_aside() -> None:
    answers = Answers()
    with FaultyServer(always=status(500)) as server, pytest.raises(InvalidArgument, match="no answer at all"):
        ask_all(server, ["q0", "q1", "q2"], answers=answers)
    assert server.counts == {"q0": 1, "q1": 1, "q2": 1}
    assert answers.replies == {}


def test_nobody_at_the_address_is_seen_at_the_first_request() -> None:
    with FaultyServer() as server:
        pass
    with pytest.raises(InvalidArgument, match="no connection: start the endpoint or correct the address"):
        ask_all(server, ["q0", "q1"])


def test_a_stop_waits_for_what_is_under_way_and_begins_no_more() -> None:
    with FaultyServer(delay=0.05) as server:
        answers = ask_all(server, [f"q{i}" for i in range(50)], most=5)
    assert 5 <= len(answers.replies) <= 9
    assert set(answers.replies) == set(server.asked)


def test_a_key_of_blanks_is_none_and_a_line_end_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert key_from_environment(OPENAI_KEY) == KEY
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    assert key_from_environment(OPENAI_KEY) is None
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key_from_environment(OPENAI_KEY) is None


@pytest.mark.parametrize("key", [f"{KEY}é", f"{KEY}\nX-Other: 1"])
def test_a_key_that_no_header_takes_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InvalidArgument, match="no key can have") as caught:
        key_from_environment(OPENAI_KEY)
    assert "4711" not in str(caught.value)
