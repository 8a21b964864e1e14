"""Flags of train_classifier.py: the model, and the length of its texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._aliases import aliases
from dptune._validate import require_count
from dptune.published import published_model


@dataclass
class CheckpointArguments:
    """The model to fine-tune."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default="prajjwal1/bert-tiny",
        metadata={
            "help": "folder or hub name of an encoder or decoder with its tokenizer",
            "aliases": aliases("model_checkpoint"),
        },
    )
    block_size: int = field(
        default=128,
        metadata={
            "help": "maximum number of tokens per example; longer ones are cut",
            "aliases": aliases("max_length"),
        },
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = published_model(self.model_name_or_path)
        require_count("--block_size", self.block_size, minimum=2)
