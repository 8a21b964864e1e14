"""Flags that choose the model to load."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from dptune.published import published_model
from utils.models.quantization import BITS, require_available

# Ways of computing attention, as transformers names them.
EAGER, SDPA, FLASH, FLEX = "eager", "sdpa", "flash_attention_2", "flex_attention"
ATTENTION = (EAGER, SDPA, FLASH, FLEX)


@dataclass
class ModelArguments:
    """Which model to load, and the token for access to it."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "folder or Hugging Face Hub name of the model and its tokenizer, or a GGUF file"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a model on the hub"})
    qbits: int = field(
        default=16,
        metadata={"help": "bits per frozen weight; 4 and 8 need bitsandbytes", "choices": BITS},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "how attention is computed; default: what transformers chooses", "choices": ATTENTION},
    )
    access_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "token for gated models on the hub; safer to set the environment variable HF_TOKEN instead"},
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = published_model(self.model_name_or_path)
        # Not the field's default, because --help prints defaults.
        self.access_token = self.access_token or os.environ.get("HF_TOKEN") or None
        require_available(self.qbits)

    @property
    def hub(self) -> dict[str, str | None]:
        """Arguments of `from_pretrained` besides the name."""
        return {"token": self.access_token, "revision": self.revision}
