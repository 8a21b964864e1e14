"""Flags of training: which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune.lora_targets import DEFAULT_TARGETS


@dataclass
class LoraArguments:
    """What is trained: adapters, or parameters of the model itself."""

    _argument_group_name = "what is trained"

    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "train the model's own parameters instead of LoRA adapters: all, biases, norms, or patterns of "
            "parameter names such as *.attn.*; saves the whole model; default: train adapters"
        },
    )

    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "scaling: adapter outputs are multiplied by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout probability of the adapters' inputs"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={
            "help": "names, name endings or patterns (*.language_model.*.q_proj) of the linear layers to adapt; "
            "lm_head too"
        },
    )
