"""Flags of training: several views of an example, and the token dropout that makes them differ."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse, require_count


@dataclass
class ViewArguments:
    """Several randomly changed copies of each example. Their average gradient is clipped, so epsilon stays the same."""

    _argument_group_name = "views"

    views: int = field(
        default=1,
        metadata={
            "help": "number of copies of each example per step, each with its own random dropout; their gradients are "
            "averaged, and the average is clipped, so epsilon stays the same. k views take k times the computing"
        },
    )
    token_dropout: float = field(
        default=0.0,
        metadata={
            "help": "probability of replacing each input token in training: with the tokenizer's mask token, or with "
            "a random token if it has none. Labels, special tokens and padding stay as they are"
        },
    )

    def __post_init__(self) -> None:
        require_count("--views", self.views)
        if not 0 <= self.token_dropout < 1:
            refuse("--token_dropout", self.token_dropout, "give a number of at least 0 and below 1")
