"""Ask an OpenAI-compatible endpoint for answers: a limited number at once, with retries, each kept as it comes.

The client retries on 408, 409, 429, 5xx, time-outs and dropped connections. It waits 0.5, 1, 2, 4, 8, 8, ... seconds
minus up to a random quarter, or as long as the endpoint's Retry-After says (up to two minutes). What still fails is a
*failure*. A row is blamed for its failure only once the endpoint has answered a question that was asked later. Until
then the endpoint may be down, which must not set thousands of rows aside. For the last rows, a question that was
answered before is asked again.
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

_NO_KEY = "none"  # the client needs a key; servers without keys ignore it
_LONGEST_RETRY_AFTER = 120.0  # seconds that the client obeys
_FEWEST_IN_A_ROW = 10
_ONE_WORD = re.compile("[A-Za-z_]{1,60}")
_RETRIED = (408, 409, 429)
_PERHAPS_THE_ROWS = (400, 413, 422)  # the row may be too long, or rejected by a filter

Answered = Callable[[Question, Reply], None]


class Failure(Exception):
    """A question without a reply.

    Args:
        what: the reason. It quotes nothing that the endpoint wrote except an error's one-word name.
        status: HTTP status; None if there was no response.
        unreachable: whether no connection could be made.
    """

    def __init__(self, what: str, status: int | None = None, *, unreachable: bool = False) -> None:
        super().__init__(what)
        self.what, self.status, self._unreachable = what, status, unreachable

    @property
    def is_everyones(self) -> bool:
        """Whether a first question that fails like this means that every question will."""
        refused = self.status is not None and self.status < 500 and self.status not in _RETRIED
        return refused or self._unreachable


class Endpoint:
    """An endpoint.

    Args:
        base_url: the address without `/chat/completions`.
        key: see `utils.cli.endpoints.key_from_environment`.
        request: settings sent with every instruction, by their names in the chat completions API (`model`, ...).
        system_prompt: system prompt of every request, if any.
        timeout: seconds without a byte that end an attempt.
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
        # Also ends requests to an endpoint that avoids the time-out by sending a byte now and then.
        self._longest = (max_retries + 1) * timeout + max_retries * _LONGEST_RETRY_AFTER
        self._client = openai.AsyncOpenAI(
            api_key=key or _NO_KEY, base_url=base_url, timeout=timeout, max_retries=max_retries
        )

    async def ask(self, instruction: str) -> Reply:
        """The reply to one instruction.

        Raises:
            Failure: there was no reply after all retries.
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
        """Close the connections."""
        await self._client.close()

    def _name_of(self, error: openai.APIStatusError) -> str:
        """An error's code or type, if it is one word. Its message may quote the instruction or the key."""
        body = error.body if isinstance(error.body, dict) else {}
        for name in (body.get("code"), body.get("type")):
            if isinstance(name, str) and _ONE_WORD.fullmatch(name) and name != self._key:
                return f" ({name})"
        return ""


class Asking:
    """One pass over questions.

    Args:
        endpoint: the endpoint.
        questions: in the order in which they are asked.
        answered: called with every reply as it comes, and with failures that are due to the row.
        max_concurrency: maximum number of questions at once.
        stopping: returns True when no more questions should be asked.
        good: a question that an earlier run with the same settings got an answer to, or None. If given, a rejected
            request may be due to its row from the first question on.
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
        self._begun = 0  # number of questions asked so far
        self._held: list[tuple[Question, Failure, int]] = []  # (..., number of questions asked when it failed)
        self._in_a_row = 0
        self._good = good  # the last question that was answered
        self._has_answered = False  # in this run
        self._problem: InvalidArgument | None = None

    async def run(self) -> None:
        """Ask all questions. After a stop, wait for those under way.

        Raises:
            InvalidArgument: the endpoint rejects the first question, fails too often in a row, or does not answer at
                the end. Answers are kept; the next run asks the other questions.
        """
        await self._ask_next()  # alone, because a wrong key, address or model is wrong for all
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
        """Ask one question; False if none is left."""
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
        """Count a question without an answer. Many in a row mean a problem with the endpoint or the settings."""
        self._in_a_row += 1
        if self._problem is None and self._in_a_row >= self._most_in_a_row:
            told = f"no usable answer {self._in_a_row} times in a row; last reason: {reason}"
            self._problem = _about(self._endpoint, f"{told}; fix it and run the same line again to resume")

    def _settle_held(self, number: int) -> None:
        """The endpoint answered question `number`, so earlier failures are due to their own rows."""
        settled = [held for held in self._held if held[2] < number]
        self._held = [held for held in self._held if held[2] >= number]
        for question, failure, _ in settled:
            self._answered(question, Reply(reason=failure.what))

    async def _settle_last(self, good: Question) -> None:
        """Blame the last failed rows if the endpoint still answers a question that it answered before."""
        try:
            up = (await self._endpoint.ask(good.instruction)).answer is not None
        except Failure:
            up = False
        if not up:
            rows = "row" if len(self._held) == 1 else f"{len(self._held)} rows"
            told = f"it stopped answering: no answer for the last {rows} ({self._held[-1][1].what})"
            raise _about(self._endpoint, f"{told}; check it and run the same line again to resume")
        self._settle_held(self._begun + 1)

    def _gave_up(self) -> InvalidArgument:
        last = self._held[-1][1].what
        return _about(self._endpoint, f"there was no answer at all; last reason: {last}; fix it and run again")


def _explain(endpoint: Endpoint, question: Question, failure: Failure) -> InvalidArgument:
    """What to do about a rejected request."""
    if failure.status is None:
        remedy = "start the endpoint or correct the address, then run the same line again"
    elif failure.status == 401:
        accepted = f"the key in the environment variable {OPENAI_KEY} is not accepted; give a valid one"
        remedy = accepted if endpoint.has_key else f"it needs a key; set the environment variable {OPENAI_KEY}"
    elif failure.status == 403:
        remedy = f"the key in {OPENAI_KEY} is not allowed to use this model or route; give another key or --model"
    elif failure.status == 404:
        remedy = (
            "no such route or model; give the address without /chat/completions (usually ends in /v1), check --model"
        )
    else:
        remedy = (
            "it rejects the request; check --model, --max_tokens, --token_limit_field and --temperature, or remove the "
            f"row with id {question.row['id']!r} if it is too long"
        )
    return _about(endpoint, f"{failure.what}: {remedy}")


def _about(endpoint: Endpoint, remedy: str) -> InvalidArgument:
    """An exception like that of `dptune._validate.refuse`, to be raised once the requests under way have ended."""
    return InvalidArgument("--base_url", endpoint.base_url, remedy)
