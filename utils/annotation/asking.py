"""Asking an OpenAI-compatible endpoint for answers: a bounded number at a time, retried, each kept as it comes.

Retries are the client's own: on 408, 409, 429, 5xx, time-outs and dropped connections it waits 0.5, 1, 2, 4, 8, 8, ...
seconds less a random quarter, or as long as the endpoint's Retry-After says (up to two minutes). What still fails then
is a *failure*. One row's failure is held against that row only once the endpoint has answered another that was asked
later: until then it may be the endpoint that is down, which must not set thousands of rows aside. For the last rows a
question that was answered before is asked once more.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import openai
from openai.types.chat import ChatCompletionMessageParam

from dptune._validate import InvalidArgument
from utils.annotation.files import Question
from utils.annotation.replies import Reply, read_reply
from utils.cli.endpoints import OPENAI_KEY

_NO_KEY = "none"  # the client insists on one; servers that want none ignore it
_LONGEST_RETRY_AFTER = 120.0  # seconds that the client obeys
_FEWEST_IN_A_ROW = 10
_ONE_WORD = re.compile("[A-Za-z_]{1,60}")
_RETRIED = (408, 409, 429)
_PERHAPS_THE_ROWS = (400, 413, 422)  # too long, or not to a filter's liking

Answered = Callable[[Question, Reply], None]


class Failure(Exception):
    """A question to which no reply came.

    Args:
        what: the reason, without anything that the endpoint wrote but an error's one-word name.
        status: of HTTP; None where there was no response.
        unreachable: whether not even a connection was had.
    """

    def __init__(self, what: str, status: int | None = None, *, unreachable: bool = False) -> None:
        super().__init__(what)
        self.what, self.status, self._unreachable = what, status, unreachable

    @property
    def is_everyones(self) -> bool:
        """Whether it would be the same for every question, if it is so for the first."""
        refused = self.status is not None and self.status < 500 and self.status not in _RETRIED
        return refused or self._unreachable


class Endpoint:
    """Somewhere to ask.

    Args:
        base_url: up to and without `/chat/completions`.
        key: see `utils.cli.endpoints.key_from_environment`.
        request: what goes with every instruction, as the chat completions route names it (`model`, ...).
        system_prompt: said before every instruction, if any.
        timeout: seconds without a byte after which an attempt is given up.
        max_retries: attempts after the first.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        request: Mapping[str, object],
        *,
        system_prompt: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 6,
    ) -> None:
        self.base_url = base_url
        self.has_key = key is not None
        self._key = key
        self._request = dict(request)
        self._before: list[ChatCompletionMessageParam] = []
        if system_prompt is not None:
            self._before.append({"role": "system", "content": system_prompt})
        # An endpoint that sends a byte now and then never times out by itself: this ends it.
        self._longest = (max_retries + 1) * timeout + max_retries * _LONGEST_RETRY_AFTER
        self._client = openai.AsyncOpenAI(
            api_key=key or _NO_KEY, base_url=base_url, timeout=timeout, max_retries=max_retries
        )

    async def ask(self, instruction: str) -> Reply:
        """The reply to one instruction.

        Raises:
            Failure: there was none, after all retries.
        """
        asked: ChatCompletionMessageParam = {"role": "user", "content": instruction}
        try:
            async with asyncio.timeout(self._longest):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=str(self._request["model"]), messages=[*self._before, asked], extra_body=self._request
                )
        except (TimeoutError, openai.APITimeoutError):
            raise Failure("timed out") from None
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ == "ConnectError":
                raise Failure("no connection", unreachable=True) from None
            raise Failure("the connection was dropped") from None
        except openai.APIStatusError as error:
            raise Failure(f"HTTP {error.status_code}{self._name_of(error)}", error.status_code) from None
        return read_reply(response.http_response.content)

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.close()

    def _name_of(self, error: openai.APIStatusError) -> str:
        """An error's code or type, if it is one word: its message may quote the instruction, or the key."""
        body = error.body if isinstance(error.body, dict) else {}
        for name in (body.get("code"), body.get("type")):
            if isinstance(name, str) and _ONE_WORD.fullmatch(name) and name != self._key:
                return f" ({name})"
        return ""


class Asking:
    """One pass over questions.

    Args:
        endpoint: who is asked.
        questions: in the order in which they are asked.
        answered: called with every reply as it comes, and with the failures that are a row's own.
        max_concurrency: questions under way at once, at most.
        stopping: whether to begin no more.
        good: a question that an earlier run got an answer to, with the same settings; None where there is none. With
            it, a request that is not taken may be its row's own fault from the first question on.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        questions: Sequence[Question],
        answered: Answered,
        *,
        max_concurrency: int,
        stopping: Callable[[], bool] = lambda: False,
        good: Question | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._waiting: Iterator[Question] = iter(questions)
        self._answered = answered
        self._max_concurrency = max_concurrency
        self._stopping = stopping
        self._most_in_a_row = max(_FEWEST_IN_A_ROW, 2 * max_concurrency)
        self._begun = 0  # questions, so far
        self._held: list[tuple[Question, Failure, int]] = []  # the last: questions begun when it failed
        self._in_a_row = 0
        self._good = good  # the last that was answered
        self._has_answered = False  # in this run
        self._problem: InvalidArgument | None = None

    async def run(self) -> None:
        """Ask all; those that are under way when a stop is wished for are still waited for.

        Raises:
            InvalidArgument: the endpoint does not take the first question, fails too often in a row, or has gone at the
                end. What was answered stays answered, and what was not is asked by the next run.
        """
        await self._ask_next()  # alone: what is wrong with the key, the address or the model is wrong for all
        await asyncio.gather(*(self._work() for _ in range(self._max_concurrency)))
        if self._problem is None and self._held and self._good is None:
            self._problem = self._gave_up()
        if self._problem is not None:
            raise self._problem
        if self._held and self._good is not None and not self._stopping():
            await self._settle_last(self._good)

    async def _work(self) -> None:
        while await self._ask_next():
            pass

    async def _ask_next(self) -> bool:
        """Ask one question; False if there is none left to ask."""
        if self._problem is not None or self._stopping():
            return False
        question = next(self._waiting, None)
        if question is None:
            return False
        self._begun += 1
        number = self._begun
        try:
            reply = await self._endpoint.ask(question.instruction)
        except Failure as failure:
            self._failed(question, failure)
        else:
            self._replied(question, reply, number)
        return True

    def _replied(self, question: Question, reply: Reply, number: int) -> None:
        self._answered(question, reply)
        if reply.answer is not None:
            self._good, self._in_a_row, self._has_answered = question, 0, True
            self._settle_held(number)
        else:
            self._count(str(reply.reason))

    def _failed(self, question: Question, failure: Failure) -> None:
        self._held.append((question, failure, self._begun))
        known = self._good is not None and (self._has_answered or failure.status in _PERHAPS_THE_ROWS)
        if failure.is_everyones and (not known or failure.status == 401):
            self._problem = self._problem or _explain(self._endpoint, question, failure)
        self._count(failure.what)

    def _count(self, reason: str) -> None:
        """One more without an answer; many in a row are the endpoint's or the settings' doing."""
        self._in_a_row += 1
        if self._problem is None and self._in_a_row >= self._most_in_a_row:
            told = f"no usable answer {self._in_a_row} times in a row, the last time: {reason}"
            self._problem = _about(self._endpoint, f"{told}; mend that, and the same line goes on from here")

    def _settle_held(self, number: int) -> None:
        """The endpoint answered a question begun as the `number`th: what had failed by then failed by itself."""
        settled = [held for held in self._held if held[2] < number]
        self._held = [held for held in self._held if held[2] >= number]
        for question, failure, _ in settled:
            self._answered(question, Reply(reason=failure.what))

    async def _settle_last(self, good: Question) -> None:
        """The last rows that failed: by themselves, if the endpoint still answers what it answered before."""
        try:
            up = (await self._endpoint.ask(good.instruction)).answer is not None
        except Failure:
            up = False
        if not up:
            told = f"it has gone, the last {len(self._held)} rows got no answer ({self._held[-1][1].what})"
            raise _about(self._endpoint, f"{told}; see to it, and the same line goes on from here")
        self._settle_held(self._begun + 1)

    def _gave_up(self) -> InvalidArgument:
        last = self._held[-1][1].what
        return _about(self._endpoint, f"there was no answer at all, the last time: {last}; mend that, and run it again")


def _explain(endpoint: Endpoint, question: Question, failure: Failure) -> InvalidArgument:
    """What to do about a request that the endpoint does not take."""
    if failure.status is None:
        remedy = "start the endpoint, or mend the address; then run the same line again"
    elif failure.status == 401:
        accepted = f"the key in the environment variable {OPENAI_KEY} is not accepted; put a valid one there"
        remedy = accepted if endpoint.has_key else f"it wants a key; set the environment variable {OPENAI_KEY}"
    elif failure.status == 403:
        remedy = f"the key in {OPENAI_KEY} may not use this model or route; give another key or --model"
    elif failure.status == 404:
        remedy = "no such route or model; end the address before /chat/completions (most end in /v1), check --model"
    else:
        remedy = (
            "it does not take the request; check --model, --max_tokens, --token_limit_field and --temperature, or "
            f"leave out the row with id {question.row['id']!r} if it is too long"
        )
    return _about(endpoint, f"{failure.what}: {remedy}")


def _about(endpoint: Endpoint, remedy: str) -> InvalidArgument:
    """The exception of `dptune._validate.refuse`, to be raised once what is under way has ended."""
    return InvalidArgument("--base_url", endpoint.base_url, remedy)
