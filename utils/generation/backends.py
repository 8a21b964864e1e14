"""What draws texts: the one method that every backend has, and what they share so that their texts mean the same.

A backend gets jobs (`utils.generation.batches`) and hands back finished texts as they come. The prompts, the journal
and the files are not its business (`utils.generation.run`).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from transformers import GenerationConfig

from dptune._validate import refuse
from utils.generation.arguments import SamplingArguments
from utils.generation.batches import TextJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPARE_TOKENS = 8  # for tokens without text, and for a space that decoding leaves out in front


@dataclass(frozen=True)
class Drawn:
    """One drawn text, its length in tokens, and whether it ended by itself: by an end token or at a stop string."""

    text: str
    tokens: int
    ended: bool


class Backend(Protocol):
    """Draws texts, in whatever order is fastest."""

    def draw(
        self, jobs: Sequence[TextJob], done: Container[int], *, rank: int = 0, world: int = 1
    ) -> Iterator[Sequence[tuple[TextJob, Drawn]]]:
        """Finished texts of this rank's share, each once, as soon as they are there.

        Args:
            jobs: all texts of the run, the same on every rank.
            done: indexes of jobs that need no text, the same on every rank.
            rank, world: this process and how many there are; they share what is not done.
        """


def finish(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int], stop: Sequence[str]) -> Drawn:
    """Cut at the first end token, decode, and cut before the first stop string.

    Args:
        tokenizer: decodes.
        ids: the new tokens, without the prompt's; padding may follow.
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
    """Tokens as text, as they stand."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first stop string, whether there is one).

    White space in front is left out: the space before the first word is part of its token, not of the text.

    >>> cut(" Blue.\\nUSER: And", ["USER:", "\\n"])
    ('Blue.', True)
    """
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(places, default=len(text))].lstrip(), bool(places)


def holds_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the last of the new tokens `ids` complete a stop string. It saves time; `finish` decides on the cut."""
    longest = max((len(one.encode()) for one in stop), default=0)  # a token is one byte of UTF-8 or more
    tail = decode(tokenizer, ids[-longest - _SPARE_TOKENS :])
    return any(one in tail for one in stop)


def end_tokens(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The model's own end tokens and the tokenizer's, since that is the one training appends."""
    own = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


def sampling_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingArguments
) -> GenerationConfig:
    """What the flags say, nothing of the model's own defaults but its end tokens."""
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
    """How many positions the model has, if it says so, else `max_length`, which must be within them."""
    window: int = getattr(model.config, "max_position_embeddings", None) or max_length
    if max_length > window:
        refuse("--max_length", max_length, f"this model has positions for {window} tokens; give at most that")
    return window
