"""The command lines of `benchmarks/step.py` and `benchmarks/full_finetuning.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

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
    """What every comparison needs to know. Without adapters (`adapter_rank` is None) all parameters are trained."""

    model: str | None = field(default=None, metadata={"help": "folder of a saved model"})
    shape: str | None = field(
        default=None, metadata={"help": "random weights in this shape instead", "choices": list(SHAPES)}
    )
    gradient_ckpt: bool = field(default=False, metadata={"help": "recompute activations in backward, everywhere"})
    dtype: str = field(
        default="float32", metadata={"help": "of the loaded weights; adapters are float32", "choices": list(DTYPES)}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; torch decides if not given"})
    rounds: int = field(default=7, metadata={"help": "steps of each contender that count, in turns"})
    warmup: int = field(default=1, metadata={"help": "rounds before those"})
    max_seconds: float = field(default=3600.0, metadata={"help": "no round of a setting begins later than this"})
    memory: bool = field(default=True, metadata={"help": "measure peak memory, each contender in a process of its own"})
    output: str | None = field(default=None, metadata={"help": "Markdown file for the result"})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            refuse("--model", self.model, "give exactly one of --model and --shape")
        require_count("--rounds", self.rounds)
        if self.threads is not None:
            require_count("--threads", self.threads)
        require_count("--warmup", self.warmup, minimum=0)
        require_positive("--max_seconds", self.max_seconds)
        self.device = _device(self.device)

    @property
    def adapter_rank(self) -> int | None:
        return None

    @property
    def names(self) -> Mapping[str, str]:
        """The contenders that can be chosen, and what a result calls them."""
        return ALL_PARAMETERS


@dataclass
class BenchmarkArguments(CommonArguments):
    """What is measured, and how long. Blocks are in tokens."""

    _argument_group_name = "benchmark"

    setting: str = field(default="both", metadata={"help": "what to measure", "choices": [*SETTINGS, "both"]})
    contenders: list[str] = field(
        default_factory=lambda: list(CONTENDERS), metadata={"help": "who takes part", "choices": list(CONTENDERS)}
    )
    batch: int = field(default=4, metadata={"help": "examples at a time; ours takes batch x block tokens"})
    block: int = field(default=128, metadata={"help": "length of every example in the fixed setting"})
    accumulate: int = field(default=1, metadata={"help": "batches a step in the fixed setting"})
    draw: int = field(default=64, metadata={"help": "examples a step in the ragged setting"})
    ragged_block: int = field(default=512, metadata={"help": "longer examples are cut there in the ragged setting"})
    lengths: str = field(default="abstracts", metadata={"help": "committed lengths to draw from: abstracts or chat"})
    text: str | None = field(default=None, metadata={"help": "JSONL file to draw lengths from instead; needs --model"})
    rank: int = field(default=16, metadata={"help": "of the adapters on q, k, v and o"})

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
    """What is measured, and how long, when every parameter is trained: every block with every accumulate."""

    _argument_group_name = "benchmark"

    contenders: list[str] = field(
        default_factory=lambda: list(ALL_PARAMETERS),
        metadata={"help": "who takes part", "choices": list(ALL_PARAMETERS)},
    )
    batch: int = field(default=8, metadata={"help": "examples at a time"})
    block: list[int] = field(default_factory=lambda: [128, 512], metadata={"help": "lengths of every example, tokens"})
    accumulate: list[int] = field(default_factory=lambda: [4, 1], metadata={"help": "micro-batches a step"})
    largest_batch: bool = field(
        default=True, metadata={"help": "also the largest micro-batch within --limit_gib, from --limit_tokens"}
    )
    limit_tokens: list[int] = field(
        default_factory=lambda: [2048, 4096, 6144],
        metadata={"help": "micro-batches whose memory is measured for that, in tokens"},
    )
    limit_gib: float = field(default=24.0, metadata={"help": "the limit, on a CPU without Python and libraries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("--batch", self.batch)
        for name in ("block", "accumulate", "limit_tokens"):
            for value in getattr(self, name):
                require_count(f"--{name}", value)
        if self.largest_batch and any(len(self.batches_of(block)) < 2 for block in self.block):
            refuse(
                "--limit_tokens", self.limit_tokens, "a line needs two sizes or more, of different numbers of blocks"
            )
        require_positive("--limit_gib", self.limit_gib)

    def batches_of(self, block: int) -> list[int]:
        """The micro-batch sizes whose memory is measured at that length."""
        return sorted({tokens // block for tokens in self.limit_tokens} - {0})


def _device(name: str) -> str:
    """`name` with auto resolved; refuses a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        refuse("--device", name, "give auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        refuse("--device", name, "torch sees no GPU here; give cpu")
    return name
