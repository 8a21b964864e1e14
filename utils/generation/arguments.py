"""Flags of sampling: the adapter, and how texts are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse, require_count, require_positive, require_probability
from utils.cli.endpoints import VLLM_KEY, require_address
from utils.data.prompts import PROMPT_STYLES

BACKENDS = ("hf", "continuous", "vllm")
# What the engine and shared code call the settings of sampling.
SAMPLING_FLAGS = {
    "path": "--lora_weights_path",
    **dict.fromkeys(("model", "folder", "files"), "--model_name_or_path"),
}


@dataclass
class AdapterArguments:
    """Which adapter to sample with."""

    _argument_group_name = "adapter"

    lora_weights_path: str | None = field(
        default=None,
        metadata={"help": "lora_weights.bin or a PEFT adapter folder; without it the base model itself is sampled"},
    )
    merge_lora: bool = field(
        default=True, metadata={"help": "add the adapter to the base weights: samples faster, rounds in bf16"}
    )


@dataclass
class SamplingArguments:
    """How texts are drawn and where they go. Lengths are in tokens."""

    _argument_group_name = "sampling"

    output_dir: str = field(
        metadata={"help": "folder for generations.jsonl; a run that was interrupted continues in it"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens of the prompt and the generated text together"})
    batch_size: int = field(default=8, metadata={"help": "texts drawn at once on each device, or asked for at once"})
    temperature: float = field(
        default=1.0, metadata={"help": "divides the logits; 0 takes the likeliest token (greedy)"}
    )
    top_k: int = field(default=50, metadata={"help": "draw among the k likeliest tokens; 0 among all"})
    top_p: float = field(
        default=0.9, metadata={"help": "draw among the likeliest tokens that hold this mass; 1 among all"}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1 makes repeated tokens less likely; 1 is off"}
    )
    seed: int = field(default=0, metadata={"help": "same seed and batch size, same texts; change it for other texts"})
    prompt_style: str = field(
        default="plain",
        metadata={"help": "how an instruction becomes a prompt: the style used in training", "choices": PROMPT_STYLES},
    )
    stop: list[str] | None = field(
        default=None, metadata={"help": "strings before which a text is cut; it has then ended by itself"}
    )
    deduplicate: bool = field(
        default=False,
        metadata={
            "help": "write instructions.jsonl: the texts that ended by themselves, no blank ones and none twice; "
            "always so with --prompt_style uncond_generation"
        },
    )
    backend: str = field(
        default="hf",
        metadata={
            "help": "what draws: hf in batches, continuous in batches that a new text enters as soon as one ends, "
            "vllm by the OpenAI-compatible server at --vllm_url",
            "choices": BACKENDS,
        },
    )
    vllm_url: str | None = field(
        default=None, metadata={"help": "such as http://localhost:8000/v1; its key is read from VLLM_API_KEY"}
    )
    vllm_model: str | None = field(
        default=None, metadata={"help": "name of the model or adapter on that server; needed if it has several"}
    )

    def __post_init__(self) -> None:
        require_count("--max_length", self.max_length, minimum=2)
        require_count("--batch_size", self.batch_size)
        require_count("--top_k", self.top_k, minimum=0)
        require_probability("--top_p", self.top_p)
        require_positive("--repetition_penalty", self.repetition_penalty)
        if self.temperature != 0:
            require_positive("--temperature", self.temperature)
        if self.stop is not None and not all(self.stop):
            refuse("--stop", self.stop, "an empty string would stop every text at once; leave it out")
        self._require_backend()

    def _require_backend(self) -> None:
        """What the backend cannot do, and flags of another one."""
        if self.backend == "continuous" and self.repetition_penalty != 1:
            refuse("--repetition_penalty", self.repetition_penalty, "--backend continuous has none; give 1, or hf")
        if self.backend == "vllm" and self.vllm_url is None:
            refuse("--backend", "vllm", "name its server by --vllm_url, such as http://localhost:8000/v1")
        if self.vllm_url is not None:
            require_address(self.vllm_url, flag="--vllm_url", key_variable=VLLM_KEY)
        for name in ("vllm_url", "vllm_model"):
            if self.backend != "vllm" and getattr(self, name) is not None:
                refuse(f"--{name}", getattr(self, name), "is for --backend vllm; give that too, or leave it out")
