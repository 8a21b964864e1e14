"""Flags of train_classifier.py: which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse, require_count
from utils.classification.mode_defaults import MODES


@dataclass
class ModeArguments:
    """Which parameters are trained; the classification head always is."""

    _argument_group_name = "what is trained"

    finetune_mode: str = field(
        default="full", metadata={"help": "fine-tuning mode: see docs/how_to/classification.md", "choices": MODES}
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "scale of the adapters: the output is times alpha / r"})
    use_rslora: bool = field(
        default=False, metadata={"help": "rsLoRA: the output is times alpha / sqrt(r) instead of alpha / r"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the inputs of the LoRA adapters"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "names of the linear layers that get LoRA, or all-linear (all but the head); default: attention "
            "queries and values"
        },
    )
    num_prepend_tokens: int = field(default=20, metadata={"help": "virtual tokens of a prefix or soft prompt"})
    prefix_projection: bool = field(
        default=False, metadata={"help": "train a small network that computes the prefix, instead of the prefix"}
    )

    def __post_init__(self) -> None:
        if self.finetune_mode.startswith(("prefix", "soft-prompt")):
            require_count("--num_prepend_tokens", self.num_prepend_tokens)
        if "lora" in self.finetune_mode:
            require_count("--lora_r", self.lora_r)
        if self.prefix_projection and not self.finetune_mode.startswith("prefix"):
            refuse("--prefix_projection", True, f"needs a prefix mode, not --finetune_mode {self.finetune_mode}")
