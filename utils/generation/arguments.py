"""Flags of sampling: the adapter, and how texts are generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._aliases import aliases
from dptune._validate import refuse, require_count, require_positive, require_probability
from utils.cli.endpoints import VLLM_KEY, require_address
from utils.data.prompts import PROMPT_STYLES
from utils.data.template_date import require_day

BACKENDS = ("hf", "continuous", "vllm")
# The engine's name of a setting -> the flag.
SAMPLING_FLAGS = {
    "path": "--lora_weights_path",
    **dict.fromkeys(("model", "folder", "files"), "--model_name_or_path"),
}


@dataclass
class AdapterArguments:
    """The adapter to sample with."""

    _argument_group_name = "adapter"

    lora_weights_path: str | None = field(
        default=None,
        metadata={"help": "a finished run's folder, a PEFT folder, or lora_weights.bin; default: the base model alone"},
    )
    merge_lora: bool = field(
        default=True, metadata={"help": "merge the adapter into the base weights: faster, but rounds in bf16"}
    )


@dataclass
class SamplingArguments:
    """How texts are generated and where they go. Lengths are in tokens."""

    _argument_group_name = "sampling"

    output_dir: str = field(metadata={"help": "folder for generations.jsonl; an interrupted run resumes in it"})
    max_length: int = field(
        default=512,
        metadata={"help": "maximum number of tokens of prompt and text together", "aliases": aliases("block_size")},
    )
    batch_size: int = field(default=8, metadata={"help": "texts generated at once per device, or requests at once"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature; 0 is greedy decoding"})
    top_k: int = field(default=50, metadata={"help": "sample from the k likeliest tokens; 0 is off"})
    top_p: float = field(
        default=0.9, metadata={"help": "sample from the likeliest tokens with this total probability; 1 is off"}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "penalty above 1 makes repeated tokens less likely; 1 is off"}
    )
    seed: int = field(default=0, metadata={"help": "seed: the same seed and batch size give the same texts"})
    prompt_style: str | None = field(
        default=None,
        metadata={"help": "form of the prompt; by default that of the training, or plain", "choices": PROMPT_STYLES},
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "date that the chat template tells, YYYY-MM-DD; default: the training's, or the first day"},
    )
    stop: list[str] | None = field(default=None, metadata={"help": "strings that end a text, which is cut before them"})
    deduplicate: bool = field(
        default=False,
        metadata={
            "help": "write instructions.jsonl: finished texts without blank ones and duplicates; always on with "
            "--prompt_style uncond_generation"
        },
    )
    backend: str = field(
        default="hf",
        metadata={
            "help": "generation backend: hf (fixed batches), continuous (continuous batching: a new text starts when "
            "one ends) or vllm (the OpenAI-compatible server at --vllm_url)",
            "choices": BACKENDS,
        },
    )
    vllm_url: str | None = field(
        default=None, metadata={"help": "address, such as http://localhost:8000/v1; its key is read from VLLM_API_KEY"}
    )
    vllm_model: str | None = field(
        default=None, metadata={"help": "model or adapter on that server; default: its only one"}
    )

    def __post_init__(self) -> None:
        require_count("--max_length", self.max_length, minimum=2)
        require_count("--batch_size", self.batch_size)
        require_count("--top_k", self.top_k, minimum=0)
        require_probability("--top_p", self.top_p)
        require_positive("--repetition_penalty", self.repetition_penalty)
        if self.temperature != 0:
            require_positive("--temperature", self.temperature)
        if self.template_date is not None:
            require_day(self.template_date, "--template_date")
        if self.stop is not None and not all(self.stop):
            refuse("--stop", self.stop, "an empty string would end every text at once; remove it")
        self._require_backend()

    def _require_backend(self) -> None:
        """Refuse what the backend cannot do, and flags of another backend."""
        if self.backend == "continuous" and self.repetition_penalty != 1:
            refuse(
                "--repetition_penalty",
                self.repetition_penalty,
                "--backend continuous does not support it; give 1, or --backend hf",
            )
        if self.backend == "vllm" and self.vllm_url is None:
            refuse("--backend", "vllm", "needs --vllm_url, such as http://localhost:8000/v1")
        if self.vllm_url is not None:
            require_address(self.vllm_url, flag="--vllm_url", key_variable=VLLM_KEY)
        for name in ("vllm_url", "vllm_model"):
            if self.backend != "vllm" and getattr(self, name) is not None:
                refuse(
                    f"--{name}", getattr(self, name), "works only with --backend vllm; give that too, or leave it out"
                )
