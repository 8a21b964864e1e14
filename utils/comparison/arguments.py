"""The command line of a comparison of fine-tuning modes, and the command line of train_classifier.py for each trial.

Words after `--` are flags of train_classifier.py. They must not set what is compared or what epsilon depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dptune._aliases import aliases, canonical
from dptune._validate import refuse, require_count, require_delta, require_positive
from dptune.accounting.selection import DISTRIBUTIONS
from utils.classification.arguments import CLASSIFIER_GROUPS
from utils.classification.mode_defaults import MODES, ModelRates, default_learning_rate
from utils.comparison.outcomes import SCORE_NOISE
from utils.comparison.trials import Candidate

# Flags of train_classifier.py that a comparison sets, besides those that all trials share.
_SET_BY_THE_COMPARISON = (
    "clip_norm",
    "enable_dp",
    "finetune_mode",
    "insecure_test_seed",
    "learning_rate",
    "max_batch",
    "noise_bands",
    "noise_multiplier",
    "resume_from_checkpoint",
    "seed",
    "train_file",
    "validation_file",
)
ONLY_SELECTION = ("mean_trials", "validation_noise")  # flags that only a private selection reads


@dataclass
class TrialArguments:
    """Settings that all trials share."""

    _argument_group_name = "training"

    output_dir: str = field(metadata={"help": "folder for the trials, the table and the plot"})
    model_name_or_path: str = field(
        default="prajjwal1/bert-tiny",
        metadata={"help": "folder or hub name of the model", "aliases": aliases("model_checkpoint")},
    )
    datasets: list[str] = field(default_factory=lambda: ["sst2"], metadata={"help": "GLUE tasks, each compared alone"})
    data_dir: str | None = field(default=None, metadata={"help": "folder of GLUE's TSV files; default: use the hub"})
    max_train_examples: int | None = field(default=None, metadata={"help": "number of rows to train on; default: all"})
    block_size: int = field(
        default=128, metadata={"help": "maximum number of tokens per example", "aliases": aliases("max_length")}
    )
    num_train_epochs: float = field(
        default=3, metadata={"help": "average passes over the training set", "aliases": aliases("epochs", "num_epochs")}
    )
    batch_size: int = field(default=256, metadata={"help": "average number of examples per step"})
    target_epsilon: float = field(default=8.0, metadata={"help": "epsilon of each private run or private selection"})
    delta: float | None = field(
        default=None,
        metadata={
            "help": "probability that the epsilon bound fails; default: a tenth of 1 / number of examples, rounded "
            "down to a power of ten"
        },
    )

    def __post_init__(self) -> None:
        for name in ("num_train_epochs", "target_epsilon"):
            require_positive(f"--{name}", getattr(self, name))
        require_count("--batch_size", self.batch_size)
        if self.delta is not None:
            require_delta(self.delta, name="--delta")


@dataclass
class ChoiceArguments:
    """What is compared, and how the best is chosen."""

    _argument_group_name = "comparison"

    modes: list[str] = field(default_factory=lambda: list(MODES), metadata={"help": "fine-tuning modes"})
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "learning rates to try in each mode; default: --rate_factors times its default"}
    )
    baseline_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "learning rates to try without privacy; default: --learning_rates"}
    )
    rate_factors: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={"help": "factors of each mode's default learning rate to try, if --learning_rates is not given"},
    )
    clip_norm: list[float] | None = field(
        default=None,
        metadata={
            "help": "clip norms to try in private runs; default: measured by each run",
            "aliases": aliases("max_grad_norm"),
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds: each trial runs once per seed"})
    baseline: bool = field(default=True, metadata={"help": "train each mode also without privacy"})
    private_selection: str | None = field(
        default=None,
        metadata={
            "help": "release only the best of so many random trials (docs/how_to/choosing.md)",
            "choices": DISTRIBUTIONS,
        },
    )
    mean_trials: float = field(default=10.0, metadata={"help": "average number of trials of a private selection"})
    validation_noise: float = field(
        default=SCORE_NOISE,
        metadata={"help": "standard deviation of the noise on a private selection's scores, in records"},
    )

    def __post_init__(self) -> None:
        numbers = ("learning_rates", "baseline_learning_rates", "rate_factors", "clip_norm")
        for name in ("modes", *numbers, "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                refuse(f"--{name}", " ".join(map(str, values)), "give at least one value, each only once")
        for mode in self.modes:
            if mode not in MODES:
                refuse("--modes", mode, f"give some of {', '.join(MODES)}")
        for name in numbers:
            for value in getattr(self, name) or []:
                require_positive(f"--{name}", value)
        if self.private_selection is not None and len(self.seeds) > 1:
            refuse("--seeds", " ".join(map(str, self.seeds)), "a private selection uses one seed; give one")

    def candidates(self, mode: str, of_model: ModelRates, *, private: bool) -> list[Candidate]:
        """The candidates of one mode."""
        clip_norms = self.clip_norm if private and self.clip_norm is not None else [None]
        rates = self._rates_of(mode, of_model, private=private)
        return [Candidate(mode, rate, clip_norm) for rate in rates for clip_norm in clip_norms]

    def _rates_of(self, mode: str, of_model: ModelRates, *, private: bool) -> list[float]:
        given = self.learning_rates if private else self.baseline_learning_rates or self.learning_rates
        if given is not None:
            return given
        own = default_learning_rate(mode, of_model, private=private)
        return [float(f"{factor * own:.4g}") for factor in self.rate_factors]


def trainer_flags(
    training: TrialArguments, candidate: Candidate, seed: int, *, private: bool, privacy: Sequence[str]
) -> list[str]:
    """The flags of train_classifier.py for one trial, without data set and folder; `privacy` sets the noise."""
    flags = [*candidate.flags, "--model_name_or_path", training.model_name_or_path, "--seed", str(seed)]
    flags += ["--block_size", str(training.block_size), "--num_train_epochs", repr(training.num_train_epochs)]
    flags += ["--batch_size", str(training.batch_size)]
    for name in ("data_dir", "max_train_examples"):
        if (value := getattr(training, name)) is not None:
            flags += [f"--{name}", str(value)]
    if private:
        delta = [] if training.delta is None else ["--delta", repr(training.delta)]
        flags += ["--enable_dp", *delta, *privacy]
    return flags


def refuse_compared_flags(extra: Sequence[str]) -> None:
    """Refuse flags after `--` that would change what is compared or what epsilon depends on."""
    taken, names = {*TrialArguments.__dataclass_fields__, *_SET_BY_THE_COMPARISON}, canonical(CLASSIFIER_GROUPS)
    for word in extra:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and names.get(name, name) in taken:
            refuse(f"--{name}", "after --", "the comparison sets it; give it before --, or leave it out")
