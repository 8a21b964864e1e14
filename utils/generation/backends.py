"""Generation backends: their common method, and code that they share so that their texts agree.

A backend gets jobs (`utils.generation.batches`) and returns finished texts as they come. Prompts, journal and files are
handled by `utils.generation.run`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from transformers import GenerationConfig

from dptune._validate import refuse
from dptune.integrations.vocabulary import positions_of
from utils.generation.arguments import SamplingArguments
from utils.generation.batches import TextJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPARE_TOKENS = 8  # for tokens without text, and for a leading space that decoding drops


@dataclass(frozen=True)
class Drawn:
    """One generated text, its length in tokens, and whether it ended with an end token or a stop string."""

    text: str
    tokens: int
    ended: bool


class Backend(Protocol):
    """Generates texts, in any order."""

    def draw(
        self, jobs: Sequence[TextJob], done: Container[int], *, rank: int = 0, world: int = 1
    ) -> Iterator[Sequence[tuple[TextJob, Drawn]]]:
        """Yield the finished texts of this rank's share, each once, as soon as they are ready.

        Args:
            jobs: all texts of the run, the same on every rank.
            done: indexes of jobs that are done already, the same on every rank.
            rank, world: this process and the number of processes, which share the other jobs.
        """


def drawn_from(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int], stop: Sequence[str]
) -> Drawn:
    """Cut at the first end token, decode, and cut before the first stop string.

    Args:
        tokenizer: for decoding.
        ids: the new tokens, without the prompt; padding may follow.
        ends: the end tokens.
        stop: the stop strings.
    """
    length = next((position for position, token in enumerate(ids) if token in ends), None)
    text, stopped = cut(decode(tokenizer, ids[:length]), stop)
    tokens = len(ids) if length is None else length + 1
    if stopped and length is None:
        tokens = sum(token != tokenizer.pad_token_id for token in ids)
    return Drawn(text, tokens, stopped or length is not None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as text, without clean-up of spaces."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first stop string, whether there is one).

    Leading white space is removed: the space before the first word belongs to its token, not to the text.

    >>> cut(" Blue.\\nUSER: And", ["USER:", "\\n"])
    ('Blue.', True)
    """
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(places, default=len(text))].lstrip(), bool(places)


def holds_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the new tokens `ids` end with a stop string. This saves time; `finish` decides where to cut."""
    longest = max((len(one.encode()) for one in stop), default=0)  # a token has at least one byte
    tail = decode(tokenizer, ids[-longest - _SPARE_TOKENS :])
    return any(one in tail for one in stop)


def end_tokens(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens of the model and of the tokenizer; training appends the tokenizer's."""
    own = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


def sampling_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingArguments
) -> GenerationConfig:
    """The flags' settings. Of the model's own defaults only the end tokens are used."""
    config = GenerationConfig(
        do_sample=sampling.temperature != 0,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=end_tokens(model.generation_config, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    if config.do_sample:
        config.update(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return config


def require_positions(model: PreTrainedModel, max_length: int) -> int:
    """The model's number of positions, or `max_length` if unknown. Refuses a `max_length` beyond it."""
    window = positions_of(model) or max_length
    if max_length > window:
        refuse("--max_length", max_length, f"this model supports at most {window} tokens; give at most that")
    return window
