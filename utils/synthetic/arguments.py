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
    """What is compared with what."""

    _argument_group_name = "texts"

    synthetic_file: list[str] = field(metadata={"help": "files of synthetic texts, compared side by side"})
    held_out_file: str = field(metadata={"help": "real texts that no generator was trained on"})
    output_dir: str = field(metadata={"help": "folder for evaluation.json and evaluation.html; both NOT PRIVATE"})
    train_file: str | None = field(
        default=None, metadata={"help": "the rows the generators were trained on: adds the search for memorised text"}
    )
    names: list[str] | None = field(
        default=None, metadata={"help": "a name for each synthetic file; default: the files' own names"}
    )
    text_column: str = field(default="instruction", metadata={"help": "column that holds the texts"})
    real_column: str | None = field(
        default=None, metadata={"help": "the same of the held-out and training files; default: --text_column"}
    )
    max_texts: int = field(
        default=5000, metadata={"help": "draw so many texts of each file; training rows are all searched"}
    )
    seed: int = field(default=0, metadata={"help": "of the draws, the clusterings, the bootstrap and the proxy models"})

    def __post_init__(self) -> None:
        require_count("--max_texts", self.max_texts, minimum=10)
        require_count("--seed", self.seed, minimum=0)
        self.names = _names(self.synthetic_file, self.names)
        if self.train_file is not None and Path(self.train_file).resolve() == Path(self.held_out_file).resolve():
            refuse("--train_file", self.train_file, "is --held_out_file too; hold out rows that were not trained on")

    @property
    def named_files(self) -> dict[str, str]:
        """The synthetic files by name, in the order given."""
        return dict(zip(self.names or (), self.synthetic_file, strict=True))


@dataclass
class StatisticsArguments:
    """What is computed."""

    _argument_group_name = "statistics"

    embedder: str = field(default="tfidf", metadata={"help": "tfidf, or a sentence-transformers model"})
    embedding_dimensions: int = field(default=64, metadata={"help": "of the tfidf embeddings"})
    clusters: int | None = field(default=None, metadata={"help": "of MAUVE; default: a tenth as many as texts"})
    bootstrap: int = field(default=200, metadata={"help": "resamples for MAUVE's error"})
    passage_words: int = field(
        default=20, metadata={"help": "a passage of so many words shared with a training row is listed as memorised"}
    )

    def __post_init__(self) -> None:
        require_count("--embedding_dimensions", self.embedding_dimensions)
        if self.clusters is not None:
            require_count("--clusters", self.clusters, minimum=2)
        require_count("--bootstrap", self.bootstrap, minimum=2)
        require_count("--passage_words", self.passage_words)


@dataclass
class ProxyArguments:
    """The models that are trained on each sample and tested on the held-out texts."""

    _argument_group_name = "proxy models"

    proxy_model: str = field(
        default=TINY, metadata={"help": f"{TINY}, folder or hub name of a causal language model, or {NO_PROXY}"}
    )
    proxy_tokenizer: str | None = field(
        default=None, metadata={"help": f"for {TINY}: folder or hub name; default: made from the held-out texts"}
    )
    proxy_steps: int = field(default=ProxySettings.steps, metadata={"help": "training steps of each"})
    proxy_batch_size: int = field(default=ProxySettings.batch_size, metadata={"help": "windows of text a step"})
    proxy_max_length: int = field(default=ProxySettings.max_length, metadata={"help": "tokens of a window"})
    proxy_learning_rate: float | None = field(
        default=None, metadata={"help": "highest rate of the cosine schedule; default: by the model"}
    )

    def __post_init__(self) -> None:
        for name in ("proxy_steps", "proxy_batch_size", "proxy_max_length"):
            require_count(f"--{name}", getattr(self, name))
        if self.proxy_learning_rate is not None:
            require_positive("--proxy_learning_rate", self.proxy_learning_rate)
        if self.proxy_tokenizer is not None and self.proxy_model != TINY:
            refuse("--proxy_tokenizer", self.proxy_tokenizer, f"--proxy_model {self.proxy_model} brings its own")

    def settings(self, seed: int) -> ProxySettings | None:
        """As the models take them; None for no model."""
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
    """A name for each file, no two alike: those given, or else the files' names, with their folders' where needed."""
    if names is None:
        stems = [Path(file).stem for file in files]
        alike = len(set(stems)) < len(stems)
        names = [f"{Path(file).resolve().parent.name}/{Path(file).stem}" for file in files] if alike else stems
    if len(names) != len(files):
        refuse("--names", " ".join(names), f"there are {len(files)} synthetic files; give each a name")
    for name in names:
        if name in _RESERVED or not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            refuse("--names", name, f"give another name, in at most {_LONGEST_NAME} printable characters")
    if len(set(names)) < len(names):
        refuse("--names", " ".join(names), "two are alike; give each synthetic file a name of its own")
    return list(names)
