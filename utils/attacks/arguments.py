"""Flags of the attack on a trained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import refuse, require_count, require_within
from dptune.published import PUBLISH_NAME
from utils.files.folders import require_makeable_folder

FOLDER_NAME = "attack"  # in the run's folder


@dataclass
class AttackArguments:
    """The run to attack, the rows, and the attacks."""

    _argument_group_name = "attack"

    run: str = field(metadata={"help": "output folder of a finished run of train_clm.py", "positional": True})
    output_dir: str | None = field(
        default=None,
        metadata={"help": f"folder for attack.json and attack.html, both NOT PRIVATE; default: RUN/{FOLDER_NAME}"},
    )
    train_file: list[str] | None = field(
        default=None, metadata={"help": "training rows; default: those that the run's config.yaml names"}
    )
    held_out_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "rows like the training's that the run was not trained on; default: the run's validation rows"
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "folder or hub name of the base model; default: that of the run"}
    )
    max_rows: int = field(
        default=1000, metadata={"help": "maximum number of random training rows, and of held-out rows, to score"}
    )
    min_k: float = field(
        default=20.0, metadata={"help": "per cent of a row's tokens in the attack on the least likely"}
    )
    secrets: str | None = field(
        default=None,
        metadata={
            "help": "planted secrets: training rows with {} where the secret stands, and a column `secret` (see "
            "docs/reviewers/attack.md); default: none"
        },
    )
    candidates: int = field(
        default=1000, metadata={"help": "random candidates of each secret's form that it is compared with"}
    )
    samples: str | None = field(
        default=None,
        metadata={"help": "texts of the model (generations.jsonl) to search for copies; default: new ones are sampled"},
    )
    num_samples: int = field(
        default=50, metadata={"help": "texts to sample and search for copies, without --samples; 0 samples none"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the rows, the candidates and the texts"})

    def __post_init__(self) -> None:
        require_count("--max_rows", self.max_rows, minimum=2)
        require_within("--min_k", self.min_k, (1, 100))
        require_count("--candidates", self.candidates)
        require_count("--num_samples", self.num_samples, minimum=0)
        require_count("--seed", self.seed, minimum=0)
        if PUBLISH_NAME in self.folder.resolve().parts:
            told = f"lies in a folder {PUBLISH_NAME}, and the results are not private; give another one"
            refuse("--output_dir", str(self.folder), told)
        require_makeable_folder(self.folder, "--output_dir")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.run) / FOLDER_NAME if self.output_dir is None else Path(self.output_dir)
