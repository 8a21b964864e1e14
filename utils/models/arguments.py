"""Flags that say which model is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from utils.models.quantization import BITS, require_available


@dataclass
class ModelArguments:
    """Which model to load, and the key to it."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "folder or hub name of the model and its tokenizer"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    qbits: int = field(
        default=16,
        metadata={"help": "bits of the frozen weights; 4 and 8 need bitsandbytes and no sharding", "choices": BITS},
    )
    access_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "token for gated models on the hub; better in the environment variable HF_TOKEN"},
    )

    def __post_init__(self) -> None:
        # Read here, not as the field's default: argparse prints defaults in --help.
        self.access_token = self.access_token or os.environ.get("HF_TOKEN") or None
        require_available(self.qbits)

    @property
    def hub(self) -> dict[str, str | None]:
        """What the hub's client is told beside the name."""
        return {"token": self.access_token, "revision": self.revision}
