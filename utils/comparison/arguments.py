"""The command line of a comparison of ways of fine-tuning, and the trainer's command line that each trial gets.

Words behind `--` are the trainer's own flags. They may not name what is compared, nor what epsilon is computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dptune._validate import refuse, require_count, require_delta, require_positive
from dptune.accounting.selection import DISTRIBUTIONS
from utils.classification.mode_defaults import MODES, default_learning_rate
from utils.comparison.outcomes import SCORE_NOISE
from utils.comparison.trials import Candidate

# Of the trainer's flags, besides those that all trials share.
_SET_BY_THE_COMPARISON = (
    "enable_dp",
    "finetune_mode",
    "insecure_test_seed",
    "learning_rate",
    "max_grad_norm",
    "noise_multiplier",
    "resume_from_checkpoint",
    "seed",
    "train_file",
    "validation_file",
)


@dataclass
class TrialArguments:
    """What all trials share."""

    _argument_group_name = "training"

    output_dir: str = field(metadata={"help": "folder for the trials, the table and the plot"})
    model_checkpoint: str = field(default="prajjwal1/bert-tiny", metadata={"help": "folder or hub name of the model"})
    datasets: list[str] = field(default_factory=lambda: ["sst2"], metadata={"help": "GLUE tasks, compared one by one"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with GLUE's own TSV files; default: the hub"})
    max_train_examples: int | None = field(default=None, metadata={"help": "train on so many rows, chosen by the seed"})
    max_length: int = field(default=128, metadata={"help": "longest text in tokens"})
    epochs: float = field(default=3, metadata={"help": "expected passes over the training set"})
    batch_size: int = field(default=256, metadata={"help": "expected logical batch"})
    target_epsilon: float = field(default=8.0, metadata={"help": "of each private run; of a whole private selection"})
    delta: float = field(default=1e-6, metadata={"help": "chance that the bound may fail"})

    def __post_init__(self) -> None:
        for name in ("epochs", "target_epsilon"):
            require_positive(f"--{name}", getattr(self, name))
        require_count("--batch_size", self.batch_size)
        require_delta(self.delta, name="--delta")


@dataclass
class ChoiceArguments:
    """What is compared, and how the best is chosen."""

    _argument_group_name = "comparison"

    modes: list[str] = field(default_factory=lambda: list(MODES), metadata={"help": "ways of fine-tuning"})
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "tried in each mode; default: --rate_factors times the mode's own"}
    )
    baseline_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "tried without privacy; default: --learning_rates"}
    )
    rate_factors: list[float] = field(
        default_factory=lambda: [0.3, 1.0, 3.0],
        metadata={"help": "without --learning_rates: times each mode's default rate, with privacy and without"},
    )
    max_grad_norm: list[float] | None = field(
        default=None, metadata={"help": "clip norms tried in private runs; default: what the trainer measures"}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "each trial once for each of them"})
    baseline: bool = field(default=True, metadata={"help": "train each mode without privacy too"})
    private_selection: str | None = field(
        default=None,
        metadata={"help": "release the best of a random number of trials alone", "choices": DISTRIBUTIONS},
    )
    mean_trials: float = field(default=10.0, metadata={"help": "how many trials a private selection has on average"})
    validation_noise: float = field(
        default=SCORE_NOISE,
        metadata={"help": "standard deviation of a private selection's scores, in validation records"},
    )

    def __post_init__(self) -> None:
        numbers = ("learning_rates", "baseline_learning_rates", "rate_factors", "max_grad_norm")
        for name in ("modes", *numbers, "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                refuse(f"--{name}", " ".join(map(str, values)), "give at least one, and none twice")
        for mode in self.modes:
            if mode not in MODES:
                refuse("--modes", mode, f"give some of {', '.join(MODES)}")
        for name in numbers:
            for value in getattr(self, name) or []:
                require_positive(f"--{name}", value)
        if self.private_selection is not None and len(self.seeds) > 1:
            refuse("--seeds", " ".join(map(str, self.seeds)), "a private selection takes one seed")

    def candidates(self, mode: str, of_head: Callable[[], float], *, private: bool) -> list[Candidate]:
        """What is tried in one mode; `of_head` measures the rate of a head that trains alone."""
        clip_norms = self.max_grad_norm if private and self.max_grad_norm is not None else [None]
        rates = self._rates_of(mode, of_head, private=private)
        return [Candidate(mode, rate, clip_norm) for rate in rates for clip_norm in clip_norms]

    def _rates_of(self, mode: str, of_head: Callable[[], float], *, private: bool) -> list[float]:
        given = self.learning_rates if private else self.baseline_learning_rates or self.learning_rates
        if given is not None:
            return given
        own = default_learning_rate(mode, of_head, private=private)
        return [float(f"{factor * own:.4g}") for factor in self.rate_factors]


def trainer_flags(
    training: TrialArguments, candidate: Candidate, seed: int, *, private: bool, privacy: Sequence[str]
) -> list[str]:
    """The trainer's flags for one trial but for its data set and folder; `privacy` says how much noise."""
    flags = [*candidate.flags, "--model_checkpoint", training.model_checkpoint, "--seed", str(seed)]
    flags += ["--max_length", str(training.max_length), "--epochs", repr(training.epochs)]
    flags += ["--batch_size", str(training.batch_size)]
    for name in ("data_dir", "max_train_examples"):
        if (value := getattr(training, name)) is not None:
            flags += [f"--{name}", str(value)]
    if private:
        flags += ["--enable_dp", "--delta", repr(training.delta), *privacy]
    return flags


def refuse_compared_flags(extra: Sequence[str]) -> None:
    """Refuse flags behind `--` that would change what is compared, or what epsilon is computed from."""
    taken = {*TrialArguments.__dataclass_fields__, *_SET_BY_THE_COMPARISON}
    for word in extra:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in taken:
            refuse(f"--{name}", "behind --", "the comparison sets it; give it before --, or leave it out")
