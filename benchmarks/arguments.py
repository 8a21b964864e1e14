"""The command lines of `benchmarks/step.py` and `benchmarks/full_finetuning.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks import devices
from benchmarks.contenders import PLAIN, PRIVATE
from benchmarks.models import DTYPES, SHAPES
from benchmarks.peers import OPACUS_GHOST, OPACUS_GHOST_ALL, OPACUS_HOOKS, OPACUS_HOOKS_ALL, PEFT, PLAIN_LOOP
from dptune._validate import refuse, require_count, require_positive

SETTINGS = ("fixed", "ragged")
CONTENDERS = {
    "private": PRIVATE,
    "plain": PLAIN,
    "peft": PEFT,
    "opacus": OPACUS_HOOKS,
    "opacus-ghost": OPACUS_GHOST,
}
ALL_PARAMETERS = {
    "private": PRIVATE,
    "plain": PLAIN,
    "hugging-face": PLAIN_LOOP,
    "opacus": OPACUS_HOOKS_ALL,
    "opacus-ghost": OPACUS_GHOST_ALL,
}


@dataclass
class CommonArguments:
    """Settings of every comparison. Without adapters (`adapter_rank` is None) all parameters are trained."""

    model: str | None = field(default=None, metadata={"help": "folder of a saved model; give this or --shape"})
    shape: str | None = field(
        default=None,
        metadata={"help": "shape of a model with random weights, instead of --model", "choices": list(SHAPES)},
    )
    gradient_ckpt: bool = field(default=False, metadata={"help": "use activation checkpointing in every contender"})
    dtype: str = field(
        default="float32", metadata={"help": "dtype of the model; adapters are float32", "choices": list(DTYPES)}
    )
    device: str = field(default="auto", metadata={"help": "device: auto, cpu, or the accelerator's kind (cuda, xpu)"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: torch decides"})
    rounds: int = field(default=11, metadata={"help": "measured steps of each pair of contenders, taken in turns"})
    warmup: int = field(default=1, metadata={"help": "rounds before the measured ones"})
    max_seconds: float = field(default=3600.0, metadata={"help": "seconds after which a pair starts no more rounds"})
    memory: bool = field(default=True, metadata={"help": "measure peak memory too, each contender in its own process"})
    output: str | None = field(default=None, metadata={"help": "Markdown file for the result; default: only print"})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            refuse("--model", self.model, "give exactly one of --model and --shape")
        require_count("--rounds", self.rounds)
        if self.threads is not None:
            require_count("--threads", self.threads)
        require_count("--warmup", self.warmup, minimum=0)
        require_positive("--max_seconds", self.max_seconds)
        self.device = devices.choose(self.device)

    @property
    def adapter_rank(self) -> int | None:
        return None

    @property
    def names(self) -> Mapping[str, str]:
        """The available contenders -> their names in results."""
        return ALL_PARAMETERS


@dataclass
class BenchmarkArguments(CommonArguments):
    """What to measure. Blocks are in tokens."""

    _argument_group_name = "benchmark"

    setting: str = field(default="both", metadata={"help": "setting to measure", "choices": [*SETTINGS, "both"]})
    contenders: list[str] = field(
        default_factory=lambda: list(CONTENDERS), metadata={"help": "contenders", "choices": list(CONTENDERS)}
    )
    batch: int = field(default=4, metadata={"help": "examples per forward pass; dptune takes batch x block tokens"})
    block: int = field(default=128, metadata={"help": "tokens per example in the fixed setting"})
    accumulate: int = field(default=1, metadata={"help": "batches per step in the fixed setting"})
    draw: int = field(default=64, metadata={"help": "examples per step in the ragged setting"})
    ragged_block: int = field(default=512, metadata={"help": "maximum tokens per example in the ragged setting"})
    lengths: str = field(default="abstracts", metadata={"help": "table of lengths to draw from: abstracts or chat"})
    text: str | None = field(default=None, metadata={"help": "JSONL file to draw lengths from, instead of --lengths"})
    rank: int = field(default=16, metadata={"help": "rank of the adapters on q, k, v and o"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and self.model is None:
            refuse("--text", self.text, "needs the tokenizer of a --model")
        for name in ("batch", "block", "accumulate", "draw", "ragged_block", "rank"):
            require_count(f"--{name}", getattr(self, name))

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings to measure."""
        return SETTINGS if self.setting == "both" else (self.setting,)

    @property
    def adapter_rank(self) -> int | None:
        return self.rank

    @property
    def names(self) -> Mapping[str, str]:
        return CONTENDERS


@dataclass
class FullFinetuningArguments(CommonArguments):
    """What to measure when every parameter is trained: every --block with every --accumulate."""

    _argument_group_name = "benchmark"

    contenders: list[str] = field(
        default_factory=lambda: list(ALL_PARAMETERS),
        metadata={"help": "contenders", "choices": list(ALL_PARAMETERS)},
    )
    batch: int = field(default=8, metadata={"help": "examples per forward pass"})
    block: list[int] = field(default_factory=lambda: [128, 512], metadata={"help": "tokens per example"})
    accumulate: list[int] = field(default_factory=lambda: [4, 1], metadata={"help": "micro-batches per step"})
    largest_batch: bool = field(
        default=True, metadata={"help": "also predict the largest micro-batch within --limit_gib"}
    )
    limit_tokens: list[int] = field(
        default_factory=lambda: [2048, 4096, 6144],
        metadata={"help": "sizes of micro-batches, in tokens, whose memory is measured for this prediction"},
    )
    limit_gib: float = field(default=24.0, metadata={"help": "memory limit; on a CPU without Python and libraries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("--batch", self.batch)
        for name in ("block", "accumulate", "limit_tokens"):
            for value in getattr(self, name):
                require_count(f"--{name}", value)
        if self.largest_batch and any(len(self.batches_of(block)) < 2 for block in self.block):
            refuse("--limit_tokens", self.limit_tokens, "give at least two sizes with different numbers of examples")
        require_positive("--limit_gib", self.limit_gib)

    def batches_of(self, block: int) -> list[int]:
        """The micro-batch sizes whose memory is measured at this length."""
        return sorted({tokens // block for tokens in self.limit_tokens} - {0})
