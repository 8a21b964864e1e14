"""Flags of training: which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse
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

    initial_adapter: str | None = field(
        default=None,
        metadata={
            "help": "adapter to go on training: a file or folder of this project or of PEFT. It decides rank, scale "
            "and layers; default: new adapters"
        },
    )
    initial_adapter_is_public: bool = field(
        default=False,
        metadata={"help": "declares that --initial_adapter was trained on public data alone; the report says so"},
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "scaling: adapter outputs are multiplied by alpha / r"})
    use_rslora: bool = field(
        default=False, metadata={"help": "rsLoRA: adapter outputs are multiplied by alpha / sqrt(r) instead"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout probability of the adapters' inputs"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={
            "help": "names, name endings or patterns (*.language_model.*.q_proj) of the linear layers to adapt; "
            "lm_head too; all-linear: every linear layer of the decoder without the output head"
        },
    )

    def __post_init__(self) -> None:
        if self.initial_adapter is None and self.initial_adapter_is_public:
            refuse("--initial_adapter_is_public", True, "is not read without --initial_adapter; leave it out")
        if self.initial_adapter is not None and self.trainable:
            refuse("--initial_adapter", self.initial_adapter, "--trainable trains no adapter; leave one of them out")
