"""Flags of a Trainer on a corpus of texts (`scripts/nlg_reddit`): the model, the texts and the privacy unit."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._aliases import aliases
from dptune._validate import refuse, require_count
from dptune.published import published_model
from dptune.units.unit import PrivacyUnit

SAMPLE, AUTHOR = "sample", "author"  # privacy units


@dataclass
class CorpusModelArguments:
    """The model, and what to train."""

    model_name_or_path: str = field(
        metadata={
            "help": "folder or Hugging Face Hub name of a causal LM and its tokenizer",
            "aliases": aliases("model_name"),
        }
    )
    block_size: int = field(
        default=128,
        metadata={"help": "maximum tokens per text; longer ones are cut", "aliases": aliases("sequence_len")},
    )
    lora_r: int = field(
        default=0, metadata={"help": "rank of LoRA adapters; 0 trains the whole model", "aliases": aliases("lora_dim")}
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "scaling: adapter outputs are multiplied by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout probability of the adapters' inputs"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "layers to adapt; default: c_attn (GPT-2), else q_proj k_proj v_proj o_proj"}
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = published_model(self.model_name_or_path)
        require_count("--block_size", self.block_size, minimum=2)
        require_count("--lora_r", self.lora_r, minimum=0)


@dataclass
class CorpusArguments:
    """The texts, and the privacy unit."""

    train_file: str | None = field(
        default=None, metadata={"help": "texts, one per row (JSONL, JSON, CSV, Parquet, saved DatasetDict); required"}
    )
    text_column: str = field(default="text", metadata={"help": "column with the texts"})
    author_column: str | None = field(default=None, metadata={"help": "column that names each text's author"})
    validation_file: str | None = field(default=None, metadata={"help": "held-out texts; their loss is not private"})
    held_out_share: float = field(
        default=0.05, metadata={"help": "average share of --train_file to hold out if there is no --validation_file"}
    )
    privacy_level: str = field(
        default=SAMPLE,
        metadata={"help": "privacy unit: one text, or all texts of one author", "choices": (SAMPLE, AUTHOR)},
    )
    examples_per_author: int | None = field(
        default=None, metadata={"help": "maximum texts per author and step; required by --privacy_level author"}
    )
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect single texts although a column names users: one with many is protected less"},
    )

    def __post_init__(self) -> None:
        if self.train_file is None:
            refuse("--train_file", None, "give the texts: JSONL, JSON, CSV or Parquet with one text per row")
        if not 0 <= self.held_out_share < 1:
            refuse("--held_out_share", self.held_out_share, "give a number of at least 0 and below 1")
        if self.privacy_level == SAMPLE and self.examples_per_author is not None:
            refuse("--examples_per_author", self.examples_per_author, "belongs to --privacy_level author")
        if self.privacy_level == AUTHOR:
            if self.ignore_users:
                refuse("--ignore_users", True, "contradicts --privacy_level author; leave one out")
            for name in ("author_column", "examples_per_author"):
                if getattr(self, name) is None:
                    refuse(f"--{name}", None, "--privacy_level author needs it")
            require_count("--examples_per_author", self.examples_per_author or 0)

    @property
    def users_flag(self) -> str | None:
        """The flags to recommend for a file that names users; None where such a file is taken."""
        protects_texts = self.privacy_level == SAMPLE and not self.ignore_users
        return "--privacy_level author --author_column" if protects_texts else None

    @property
    def unit(self) -> PrivacyUnit:
        """The privacy unit."""
        if self.privacy_level == SAMPLE:
            return PrivacyUnit()
        return PrivacyUnit(self.author_column, examples=self.examples_per_author or 1)
