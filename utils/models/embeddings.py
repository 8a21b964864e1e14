"""Whether a model has an embedding for every token of the data, before anything is loaded or spent.

A tokenizer may have tokens that were added after the model was made: for padding, or for a chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dptune._validate import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = "give a model with its own tokenizer, or add its embeddings (resize_token_embeddings)"
TokenRows = tuple[np.ndarray, np.ndarray]  # token ids of all rows end to end, and N + 1 positions between rows


def require_embeddings(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: Mapping[str, TokenRows],
    *,
    flag: str = "--model_name_or_path",
) -> None:
    """Refuse a model without an embedding of the pad token or of a token in the data.

    Args:
        model: may be on the meta device.
        tokenizer: with a pad token.
        name: the model's folder or hub name, given by `flag`.
        data: {what one row is called: rows}.

    Raises:
        InvalidArgument: names the token, and the row by its number.
    """
    size = len(model.get_input_embeddings().weight)
    if (pad := tokenizer.pad_token_id) is not None and pad >= size:
        told = f"its tokenizer pads with token {_shown(tokenizer, pad)}, but the model has only {size} embeddings"
        refuse(flag, name, f"{told}; {_REMEDY}")
    for what, (ids, starts) in data.items():
        beyond = np.flatnonzero((ids >= size) | (ids < 0))
        if len(beyond):
            row = int(np.searchsorted(starts, beyond[0], side="right"))
            token = _shown(tokenizer, int(ids[beyond[0]]))
            told = f"{what} {row} (counted from 1) has token {token}, but the model has only {size} embeddings"
            refuse(flag, name, f"{told}; {_REMEDY}")


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The token's number, with its name if it was added. Another one may be a word of a record."""
    added = {number: text for text, number in tokenizer.get_added_vocab().items()}
    return f"{token} ({added[token]})" if token in added else str(token)
