"""The command line of the comparison of synthetic with real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import refuse, require_count, require_positive
from utils.synthetic.proxy_settings import TINY, ProxySettings

NO_PROXY = "none"
HELD_OUT = "real, held out"
REAL_TRAINING, UNTRAINED = "real training rows", "untrained"
REFERENCE = "reference"
_RESERVED = (HELD_OUT, REAL_TRAINING, UNTRAINED, REFERENCE)
_LONGEST_NAME = 60


@dataclass
class TextArguments:
    """The texts to compare."""

    _argument_group_name = "texts"

    synthetic_file: list[str] = field(metadata={"help": "files of synthetic texts to compare side by side"})
    held_out_file: str = field(metadata={"help": "real texts that no generator was trained on"})
    output_dir: str = field(metadata={"help": "folder for evaluation.json and evaluation.html; both NOT PRIVATE"})
    train_file: str | None = field(
        default=None, metadata={"help": "training rows, to search for memorised text; default: no search"}
    )
    names: list[str] | None = field(
        default=None, metadata={"help": "a name for each synthetic file; default: the file names"}
    )
    text_column: str = field(default="instruction", metadata={"help": "column with the texts"})
    real_column: str | None = field(
        default=None, metadata={"help": "column of the held-out and training texts; default: --text_column"}
    )
    max_texts: int = field(
        default=5000, metadata={"help": "maximum number of random texts per file; all training rows are searched"}
    )
    seed: int = field(default=0, metadata={"help": "seed of draws, clusterings, bootstrap and proxy models"})

    def __post_init__(self) -> None:
        require_count("--max_texts", self.max_texts, minimum=10)
        require_count("--seed", self.seed, minimum=0)
        self.names = _names(self.synthetic_file, self.names)
        if self.train_file is not None and Path(self.train_file).resolve() == Path(self.held_out_file).resolve():
            refuse("--train_file", self.train_file, "is also --held_out_file; give rows that were not trained on there")

    @property
    def named_files(self) -> dict[str, str]:
        """The synthetic files by name, in the order given."""
        return dict(zip(self.names or (), self.synthetic_file, strict=True))


@dataclass
class StatisticsArguments:
    """The statistics to compute."""

    _argument_group_name = "statistics"

    embedder: str = field(default="tfidf", metadata={"help": "embedder: tfidf, or a sentence-transformers model"})
    embedding_dimensions: int = field(default=64, metadata={"help": "dimensions of tfidf embeddings"})
    clusters: int | None = field(default=None, metadata={"help": "clusters of MAUVE; default: number of texts / 10"})
    bootstrap: int = field(default=200, metadata={"help": "resamples for MAUVE's standard error"})
    passage_words: int = field(
        default=20, metadata={"help": "words from which a passage shared with a training row counts as memorised"}
    )

    def __post_init__(self) -> None:
        require_count("--embedding_dimensions", self.embedding_dimensions)
        if self.clusters is not None:
            require_count("--clusters", self.clusters, minimum=2)
        require_count("--bootstrap", self.bootstrap, minimum=2)
        require_count("--passage_words", self.passage_words)


@dataclass
class ProxyArguments:
    """The small models that are trained on each sample and tested on the held-out texts."""

    _argument_group_name = "proxy models"

    proxy_model: str = field(
        default=TINY, metadata={"help": f"{TINY}, {NO_PROXY}, or folder or hub name of a causal language model"}
    )
    proxy_tokenizer: str | None = field(
        default=None, metadata={"help": f"folder or hub name, for {TINY}; default: made from the held-out texts"}
    )
    proxy_steps: int = field(default=ProxySettings.steps, metadata={"help": "training steps of each model"})
    proxy_batch_size: int = field(default=ProxySettings.batch_size, metadata={"help": "windows of text per step"})
    proxy_max_length: int = field(default=ProxySettings.max_length, metadata={"help": "tokens per window"})
    proxy_learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate; default: 3e-3 for tiny, 5e-5 for others"}
    )

    def __post_init__(self) -> None:
        for name in ("proxy_steps", "proxy_batch_size", "proxy_max_length"):
            require_count(f"--{name}", getattr(self, name))
        if self.proxy_learning_rate is not None:
            require_positive("--proxy_learning_rate", self.proxy_learning_rate)
        if self.proxy_tokenizer is not None and self.proxy_model != TINY:
            refuse("--proxy_tokenizer", self.proxy_tokenizer, f"--proxy_model {self.proxy_model} has its own")

    def settings(self, seed: int) -> ProxySettings | None:
        """The settings of the models; None for no model."""
        if self.proxy_model == NO_PROXY:
            return None
        return ProxySettings(
            model=self.proxy_model,
            tokenizer=self.proxy_tokenizer,
            steps=self.proxy_steps,
            batch_size=self.proxy_batch_size,
            max_length=self.proxy_max_length,
            learning_rate=self.proxy_learning_rate,
            seed=seed,
        )


def _names(files: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """A different name for each file: as given, or else the file name, with its folder's name where needed."""
    if names is None:
        stems = [Path(file).stem for file in files]
        alike = len(set(stems)) < len(stems)
        names = [f"{Path(file).resolve().parent.name}/{Path(file).stem}" for file in files] if alike else stems
    if len(names) != len(files):
        refuse("--names", " ".join(names), f"there are {len(files)} synthetic files; give one name for each")
    for name in names:
        if name in _RESERVED or not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            refuse("--names", name, f"give another name, in at most {_LONGEST_NAME} printable characters")
    if len(set(names)) < len(names):
        refuse("--names", " ".join(names), "two names are equal; give each synthetic file its own name")
    return list(names)
