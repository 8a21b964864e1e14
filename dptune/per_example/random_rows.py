"""Random rows of chosen lengths, which stand for private ones where a model is checked before training.

What the check says must not depend on who is in the data. So only public values decide which rows are tried: the
longest row allowed, and the lengths at which the model changes by its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SHORT = 7  # tokens
_SWITCHES = ("original_max_position_embeddings", "max_position_embeddings")


class RandomRow(NamedTuple):
    """A row to be made.

    Attributes:
        length: its tokens, at least 1.
        number: rows with the same length and number are equal, and all others differ.
    """

    length: int
    number: int

    def generator(self) -> torch.Generator:
        """For all that is random in the row."""
        return torch.Generator().manual_seed(self.number)

    def tokens(self, vocab_size: int) -> Tensor:
        """Token ids, int64 [length]; token 0 is not among them unless there is no other."""
        return torch.randint(min(1, vocab_size - 1), vocab_size, (self.length,), generator=self.generator())

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32 of this shape."""
        return torch.randn(tuple(shape), generator=self.generator())


def neighbouring_lengths(model: nn.Module, longest: int) -> list[tuple[int, int]]:
    """The lengths of two rows to run together: (shorter, longer), each pair once.

    A short row, and one of half the longest length, run beside the longest. Where the model changes at a length, a row
    of that length runs beside one that is a token longer.

    Args:
        model: its `config`, if it has one, says where position embeddings change. Virtual tokens of PEFT are part of
            those lengths.
        longest: tokens of the longest row that there may be.
    """
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    switches = {length - added for length in _switches(getattr(model, "config", None)) for added in (0, virtual)}
    pairs = [(_SHORT, longest), (longest // 2, longest), *((at, at + 1) for at in sorted(switches))]
    found = [(min(max(short, 1), long - 1), long) for short, long in pairs if 1 < long <= longest]
    return list(dict.fromkeys(found)) or [(1, 1)]


def _switches(config: Any) -> Iterator[int]:
    """Lengths at which position embeddings change, anywhere in a configuration."""
    values = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _switches(value)
        elif name in _SWITCHES and isinstance(value, int):
            yield value
