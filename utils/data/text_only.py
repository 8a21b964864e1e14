"""Tokens of texts in which no special token counts: all that people typed is text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.data.special_tokens import SpecialTokens, UnwrittenToken

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


class TextOnly:
    """A tokenizer that adds special tokens around texts, and finds none in them.

    Args:
        tokenizer: the model's; fast or slow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers import PreTrainedTokenizerFast  # slow to import, so only here

        self._special, self._tokenizer = SpecialTokens(tokenizer), tokenizer
        if tokenizer.is_fast:
            self._tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=self._special.text_only,
                model_input_names=tokenizer.model_input_names,
                truncation_side=tokenizer.truncation_side,
            )

    def __call__(self, *texts: list[str], **how: Any) -> BatchEncoding:
        """The tokens of N texts, or of N pairs.

        Args:
            texts: one or two columns of N.
            how: arguments of the tokenizer.

        Raises:
            UnwrittenToken: a special token comes out of a text.
        """
        how |= {"padding": False, "split_special_tokens": True, "return_attention_mask": False, "verbose": False}
        encoded = self._tokenizer(*texts, **how)
        (around,) = self._tokenizer(*([""] for _ in texts), **how)["input_ids"]
        most = self._special.count(around)
        for number, ids in enumerate(encoded["input_ids"], start=1):
            if self._special.count(ids) > most:
                raise UnwrittenToken(number)
        return encoded
