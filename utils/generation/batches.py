"""Prompts -> tokens -> batches. Batches are planned from all prompts before anything is generated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptune._validate import Described, refuse
from utils.data.encoding import start_token
from utils.data.special_tokens import MarkedText, SpecialTokens, UnwrittenToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_START = "A"  # any letter: represents the answer after a prompt


@dataclass(frozen=True)
class TextJob:
    """One text to generate. `ids` are the prompt's tokens, at least one."""

    index: int
    prompt: str
    ids: tuple[int, ...]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | MarkedText, special: SpecialTokens | None = None
) -> list[int]:
    """The tokens before the answer in training, where prompt and answer are tokenized as one text.

    There a trailing space belongs to the answer's first token (`Abstract: The` is `Abstract`, `:`, ` The`). Trailing
    line breaks may be tokenized differently than at the end of a text. So the prompt is tokenized with an answer after
    it, and tokens beyond the prompt's last non-space character are dropped. If the tokenizer has no offsets, or merges
    the prompt's end with a letter, the prompt is tokenized alone, without trailing spaces.

    An empty prompt becomes the beginning-of-text token, or the end token if there is none. Special tokens that a person
    typed into a `MarkedText` are text. `special` saves finding those of the tokenizer.

    Raises:
        UnwrittenToken: the tokenizer cannot keep such text apart from special tokens.
    """
    marked = MarkedText(prompt) if isinstance(prompt, str) else prompt
    kept = marked._replace(text=marked.text.rstrip(" "))
    special = special or SpecialTokens(tokenizer)
    if not tokenizer.is_fast:
        ids: list[int] | None = special.encoded_without_offsets(kept)
    else:
        ids = _ids_before_answer(special, marked, len(kept.text))
        if ids is None:
            ((ids, _),) = special.encoded([kept])
    if not ids:
        ids = [start_token(tokenizer)]
    return ids


def make_jobs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | MarkedText], max_length: int
) -> list[TextJob]:
    """One job per prompt, indexed from 0.

    Raises:
        InvalidArgument: a prompt leaves no room for a token, or the tokenizer makes a special token of what is text.
    """
    special, encoded = SpecialTokens(tokenizer), {}
    for number, prompt in enumerate(prompts, start=1):
        if prompt in encoded:
            continue
        try:
            encoded[prompt] = tuple(encode_prompt(tokenizer, prompt, special))
        except UnwrittenToken:
            remedy = f"makes a special token of the text of prompt {number}; change the prompt or the model"
            refuse("--model_name_or_path", Described(f"the tokenizer {type(tokenizer).__name__}"), remedy)
    for prompt, ids in encoded.items():
        if len(ids) >= max_length:
            which = f"prompt {prompts.index(prompt) + 1} of {len(prompts)} alone has {len(ids)} tokens"
            refuse("--max_length", max_length, f"{which}; give a larger value or shorten the prompt")
    texts = [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]
    return [TextJob(index, text, encoded[prompts[index]]) for index, text in enumerate(texts)]


def plan_batches(jobs: Sequence[TextJob], batch_size: int, max_spread: int) -> list[list[TextJob]]:
    """Batches of at most `batch_size` jobs whose prompt lengths differ by at most `max_spread` tokens.

    The longest come first, so that a batch that does not fit in memory fails at once, not in the last hour.
    """
    batches: list[list[TextJob]] = []
    for job in sorted(jobs, key=lambda job: (-len(job.ids), job.index)):
        last = batches[-1] if batches else None
        if last and len(last) < batch_size and len(last[0].ids) - len(job.ids) <= max_spread:
            last.append(job)
        else:
            batches.append([job])
    return batches


def batch_seed(seed: int, batch: Sequence[TextJob]) -> int:
    """A different seed (63 bits) for each batch, because equal prompts must not get equal texts.

    It also depends on the batch size: a run resumed with another size repeats no random numbers.
    """
    return seed_of(seed, batch[0].index, len(batch))


def seed_of(*parts: int) -> int:
    """A seed (63 bits) that depends only on `parts`."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def _ids_before_answer(special: SpecialTokens, prompt: MarkedText, length: int) -> list[int] | None:
    """The tokens of the first `length` characters of `prompt` before an answer; None if tokens do not end there."""
    ((ids, offsets),) = special.encoded([prompt._replace(text=prompt.text + _ANSWER_START)])
    ends = [end for _, end in offsets]
    count = next((position for position, end in enumerate(ends) if end > length), len(ends))
    filled = max(ends[:count], default=0)
    return ids[:count] if filled == length else None
