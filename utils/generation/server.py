"""Text generation by an OpenAI-compatible server, such as vLLM's, that holds the model and the adapter.

    vllm serve PATH --enable-lora --lora-modules dptune=OUT --max-lora-rank 64

serves the base model at PATH with the PEFT adapter in a training's folder OUT, under the model name `dptune`. Run it in
vLLM's own environment.

Prompts are sent as token ids, exactly as in training, so the server's tokenizer adds nothing. Every sampling parameter
is sent, so the server's defaults (vLLM reads them from the model's folder) are not used. Each text has its own seed,
which does not depend on other texts or on interruptions.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import NoReturn

import openai
from openai.types import Completion
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from dptune._validate import present, refuse
from utils.cli.endpoints import VLLM_KEY, key_from_environment
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn, cut, end_tokens
from utils.generation.batches import TextJob, seed_of
from utils.models.gguf import source_of

_RETRIES = 6  # with growing pauses, after 408, 409, 429, 5xx and lost connections
_TIMEOUT = 600.0  # seconds per text
_FAILURES = (openai.OpenAIError, ValueError)  # ValueError: an answer that claims to be JSON but is not


class ServerBackend:
    """Requests `batch_size` texts at once.

    Args:
        model: the model's name on the server.
        tokenizer: the base model's tokenizer.
        base: folder or hub name of the base model, whose end tokens are sent.
        sampling: how to sample, and the server's address.
        token, revision: for a base model on the hub.

    `draw` raises `InvalidArgument` if the server cannot be reached, refuses, or returns no text.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        base: str,
        sampling: SamplingArguments,
        *,
        token: str | None = None,
        revision: str | None = None,
    ) -> None:
        self._url = present(sampling.vllm_url, "server")
        self._client = _client(self._url)
        self._sampling, self._stop = sampling, sampling.stop or []
        self._model, self._ends = model, end_tokens(_own_config(base, token, revision), tokenizer)

    def draw(
        self, jobs: Sequence[TextJob], done: Container[int], *, rank: int = 0, world: int = 1
    ) -> Iterator[Sequence[tuple[TextJob, Drawn]]]:
        """See `Backend.draw`."""
        waiting = iter([job for job in jobs if job.index not in done][rank::world])
        asked: dict[Future[Drawn], TextJob] = {}
        failure: BaseException | None = None
        with ThreadPoolExecutor(self._sampling.batch_size) as pool:
            while True:
                # Submit only as many as the pool works on, and none after a failure: texts under way are still kept.
                room = 0 if failure else self._sampling.batch_size - len(asked)
                asked |= {pool.submit(self._ask, job): job for job in islice(waiting, room)}
                if not asked:
                    break
                ready = wait(asked, return_when=FIRST_COMPLETED).done
                failure = next(filter(None, [failure, *(future.exception() for future in ready)]), None)
                jobs_ready = [(asked.pop(future), future) for future in ready]
                yield [(job, future.result()) for job, future in jobs_ready if future.exception() is None]
        if failure:
            raise failure

    def _ask(self, job: TextJob) -> Drawn:
        """Request one text."""
        sampling = self._sampling
        own = {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": sampling.repetition_penalty}
        try:
            answer = self._client.completions.create(
                model=self._model,
                prompt=list(job.ids),
                max_tokens=sampling.max_length - len(job.ids),
                seed=seed_of(sampling.seed, job.index),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                n=1,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                stop=sampling.stop,
                extra_body={**own, "stop_token_ids": self._ends},  # vLLM's own
            )
        except _FAILURES as error:
            _refuse(self._url, error)
        choice = answer.choices[0] if isinstance(answer, Completion) and answer.choices else None
        if choice is None or choice.text is None or choice.finish_reason not in ("stop", "length"):
            said = "no text" if choice is None else f"a text with finish_reason {choice.finish_reason!r}"
            refuse("--vllm_url", self._url, f"the server returned {said} for index {job.index}; run again to resume")
        text, stopped = cut(choice.text, self._stop)
        tokens = answer.usage.completion_tokens if answer.usage else 0
        return Drawn(text, tokens, stopped or choice.finish_reason == "stop")


def find_model(url: str, name: str | None) -> str:
    """`name` if the server has that model, or the server's only model if `name` is None; else `InvalidArgument`."""
    client = _client(url)
    try:
        # Raw, because the client itself fails on anything but a list of models, such as a web page.
        listed = json.loads(client.models.with_raw_response.list().text)
        there = sorted(model["id"] for model in listed["data"])
    except (KeyError, TypeError, ValueError):
        refuse("--vllm_url", url, "does not list models; give the address that ends in /v1")
    except openai.OpenAIError as error:
        _refuse(url, error)
    if name is None and len(there) == 1:
        return there[0]
    if name is None or name not in there:
        refuse("--vllm_model", name, f"the server has {', '.join(there) or 'no model'}; give one of them")
    return name


def _client(url: str) -> openai.OpenAI:
    """A client whose key comes from VLLM_API_KEY, never from a flag or from another service's variable."""
    key = key_from_environment(VLLM_KEY) or "none"  # the client needs a key; a server without keys ignores it
    return openai.OpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT)


def _own_config(base: str, token: str | None, revision: str | None) -> GenerationConfig:
    """The base model's generation settings, or else settings from its configuration, for the end tokens."""
    try:
        return GenerationConfig.from_pretrained(base, token=token, revision=revision)
    except OSError:  # it has none
        source = source_of(base)
        config = AutoConfig.from_pretrained(source.place, token=token, revision=revision, **source.which)
        return GenerationConfig.from_model_config(config)


def _refuse(url: str, error: Exception) -> NoReturn:
    """One line that does not quote the server, whose text may repeat the key. Finished texts are on disk."""
    status = f" (HTTP {error.status_code})" if isinstance(error, openai.APIStatusError) else ""
    refuse("--vllm_url", url, f"{type(error).__name__}{status}; check the server, then run again to resume")
