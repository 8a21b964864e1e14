"""A copy of a tokenizer whose special tokens have other names, so that no text spells one.

A tokenizer can be told not to look for special tokens in a text. Its model may still find them: the vocabularies of
Unigram models (T5, XLM-R, ALBERT, XLNet) hold `</s>` as a piece, and those of whole words as a word. Normalizers add
other spellings, such as full-width letters. A name that nobody can guess closes all of these ways.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer


def with_renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """A copy in which the tokens `names` (old name -> new name) have other names and the same ids.

    It neither cuts nor pads. Texts that spell none of the old names have the same tokens. The new names are found in a
    text as the old ones were.

    Raises:
        ValueError: a token would get another id.
    """
    content = json.loads(tokenizer.to_str())
    content |= {"truncation": None, "padding": None}
    _rename_in_model(content["model"], names)
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    copy = Tokenizer.from_str(json.dumps(content))
    added = {token["content"] for token in content["added_tokens"]}
    copy.add_tokens([AddedToken(new, normalized=False, special=True) for new in names.values() if new not in added])
    if any(copy.token_to_id(new) != tokenizer.token_to_id(old) for old, new in names.items()):
        raise ValueError("a special token would get another id")
    return copy


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Change the names in a model of the JSON format, whose kinds are Unigram, BPE, WordPiece and WordLevel."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [pair for pair in model["merges"] if not names.keys() & _in_merge(pair, prefix)]


def _in_merge(pair: str | list[str], prefix: int) -> set[str]:
    """The three tokens of a merge of BPE: its parts and what they make."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return {first, second, first + second[prefix:]}
