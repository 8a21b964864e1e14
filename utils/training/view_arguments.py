"""Flags of training: several views of an example, and what tells them apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse, require_count


@dataclass
class ViewArguments:
    """Several views of each example, whose gradients are averaged before they are clipped. Epsilon stays the same."""

    _argument_group_name = "views"

    views: int = field(
        default=1,
        metadata={
            "help": "views of each example per step, each under other dropout: the mean of their gradients is clipped "
            "once, so epsilon stays the same; takes so many times the computing (default 1)"
        },
    )
    token_dropout: float = field(
        default=0.0,
        metadata={
            "help": "probability with which training replaces each token of the input, by the tokenizer's mask token "
            "if it has one, or else by a random token; labels, special tokens and padding stay (default 0)"
        },
    )

    def __post_init__(self) -> None:
        require_count("--views", self.views)
        if not 0 <= self.token_dropout < 1:
            refuse("--token_dropout", self.token_dropout, "give a number of at least 0 and below 1")
