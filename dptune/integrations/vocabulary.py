"""Which token ids, labels and other numbers a model accepts, for random items; and how many tokens it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dptune._validate import refuse, require_count
from dptune.per_example import RandomRow

_LARGEST_DEFAULT = 4096  # tokens; two rows of them are checked
_POSITIONS = {"position_embeddings", "position_embedding", "embed_positions", "wpe", "position_embeds_layer"}
_LANGUAGE = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Vocabulary:
    """How many different values a model accepts in an item.

    Attributes:
        tokens_in: token ids.
        labels: labels of a token, if tokens have labels.
        classes: classes of a row.
        types: token types.
    """

    tokens_in: int
    labels: int
    classes: int
    types: int

    @classmethod
    def of(cls, model: Any) -> Vocabulary:
        """From a model's configuration, or from its first embedding."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        tokens = getattr(text, "vocab_size", None) or _first_embedding(base)
        classes = max(2, getattr(config, "num_labels", None) or 2)
        speaks = any(kind.__name__.endswith(_LANGUAGE) for kind in type(base).__mro__)
        return cls(tokens, tokens if speaks else classes, classes, getattr(text, "type_vocab_size", None) or 1)

    def tokens(self, name: str, row: RandomRow) -> Tensor:
        """A list of tokens that has this name in an item, int64 [row.length]."""
        if name == "position_ids":
            return torch.arange(row.length)
        if name.endswith("mask"):
            return torch.full((row.length,), int(not name.startswith("special")))
        if name == "token_type_ids":
            return torch.randint(0, self.types, (row.length,), generator=row.generator())
        if name.startswith("label"):
            return row.tokens(self.tokens_in) if self.labels == self.tokens_in else row.tokens(self.labels)
        return row.tokens(self.tokens_in)

    def number(self, name: str, row: RandomRow) -> int:
        """A whole number: a class if it is a label."""
        return row.number % (self.classes if name.startswith("label") else 2)


def _first_embedding(model: nn.Module) -> int:
    """Rows of the first embedding, which by custom is that of the tokens; 2 without one."""
    return next((layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)), 2)


def context_of(model: Any) -> int | None:
    """Maximum tokens of a row, or None if the model does not say. RoBERTa's first positions are reserved."""
    positions = positions_of(model)
    if positions is None:
        return None
    reserved = [
        layer.padding_idx + 1
        for name, layer in model.named_modules()
        if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None
    ]
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return positions - max(reserved, default=0) - virtual


def positions_of(model: Any) -> int | None:
    """How many positions a model has; None if it does not say, or has no limit: XLNet says -1."""
    positions: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def tables_of(model: Any) -> dict[str, int]:
    """{input: number of values that its embedding has}, for an input whose embedding is known.

    Token types without a table of their own are looked up among the tokens, as GPT-2 does.
    """
    tables, limits = _sizes(model), {}
    tokens = _token_embeddings(model)
    if tokens is not None:
        limits["input_ids"] = tokens
    types = [size for name, size in tables if "token_type_embeddings" in name] or ([tokens] if tokens else [])
    if types:
        limits["token_type_ids"] = max(types)
    # A table with fewer rows than the model has positions is another's, such as that of image patches.
    context = positions_of(model) or 1
    positions = [size for name, size in tables if _POSITIONS & set(name) and size >= context]
    if positions:
        limits["position_ids"] = context if context > 1 else max(positions)
    return limits


def _sizes(model: Any) -> list[tuple[list[str], int]]:
    """(parts of its name, rows) of each embedding."""
    modules = model.named_modules()
    return [(name.split("."), layer.num_embeddings) for name, layer in modules if isinstance(layer, nn.Embedding)]


def _token_embeddings(model: Any) -> int | None:
    """Number of token embeddings; None if the model has none."""
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):
        return None


def longest_item(model: Any, max_length: int | None) -> int:
    """The largest number of tokens of an item: the given one, or the model's context if it is not large.

    Raises:
        InvalidArgument: it is more than the model's context, or it must be given.
    """
    context = context_of(model)
    if max_length is None:
        if context is None or context > _LARGEST_DEFAULT:
            says = "does not say how many tokens it takes" if context is None else f"takes {context:,} tokens"
            refuse("max_length", None, f"the model {says}; give the largest number of tokens that an item may have")
        return context
    require_count("max_length", max_length)
    if context is not None and max_length > context:
        refuse("max_length", max_length, f"the model's context is {context} tokens; give at most that")
    return max_length
