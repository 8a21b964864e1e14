"""The privacy flags of a private Trainer, for `transformers.HfArgumentParser`. This module imports no transformers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from dptune._aliases import aliases, with_older_keywords
from dptune._validate import refuse, renamed
from dptune.clipping_styles import FLAT, Clipping
from dptune.run.settings import PrivacySettings, noise_bands_of

# {the engine's name of a parameter: the flag that sets it}
FLAGS = {
    "clip_norm": "--clip_norm",
    "noise_multiplier": "--noise_multiplier",
    "target_epsilon": "--target_epsilon",
    "delta": "--delta",
    "register": "--register",
    "max_batch": "--max_batch",
    "noise_bands": "--noise_bands",
    "ema": "--ema",
    "average_last": "--average_last",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "run_folder": "--output_dir",
    "resume_from": "--resume_from_checkpoint",
}
# Arguments that only a private run reads.
ONLY_PRIVATE = (
    "clip_norm",
    "noise_multiplier",
    "target_epsilon",
    "delta",
    "register",
    "noise_bands",
    "validation_is_public",
)
NOT_READ = "is not read with --disable_dp: leave one of the two out"


@with_older_keywords
@dataclass
class PrivacyArguments:
    """The privacy settings. Together with the logical batch and the steps of `TrainingArguments` they decide epsilon.

    `per_sample_max_grad_norm` and `target_delta` are other names of `clip_norm` and `delta`.

    Raises:
        InvalidArgument: both or neither of the noise multiplier and the target epsilon, a value outside its range, or
            a privacy setting together with `disable_dp`.
    """

    clip_norm: float = field(
        default=1.0,
        metadata={
            "help": "C, the maximum gradient norm per example. Default 1.",
            "aliases": aliases("per_sample_max_grad_norm"),
        },
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the noise, divided by C. Give this or --target_epsilon."},
    )
    target_epsilon: float | None = field(
        default=None,
        metadata={"help": "Find the noise multiplier for this epsilon, which the run never exceeds. No default."},
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "Probability with which the bound may fail. Default: a tenth of 1 / number of examples, rounded "
            "down to a power of ten.",
            "aliases": aliases("target_delta"),
        },
    )
    register: str | None = field(
        default=None,
        metadata={
            "help": "File with the most that all releases from these data may spend; the run is refused if it would "
            "exceed that (see dptune.budget). No default."
        },
    )
    max_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum examples per step, over all processes. Larger draws are cut, which raises epsilon. By "
            "default draws are not cut."
        },
    )
    noise_bands: str = field(
        default="1",
        metadata={
            "help": "Correlate noise over so many steps: less noise in the sum of all steps, more in each. Items then "
            "take turns in so many groups. auto: as many as make the least noise for --target_epsilon. Default 1, "
            "independent noise."
        },
    )
    validation_is_public: bool = field(
        default=False,
        metadata={
            "help": "Say that the rows of eval_dataset are public, or of people who are not in the training data. "
            "Their losses have no noise, so a private run needs this before they may choose the model, end the "
            "training or change its learning rate. Off by default."
        },
    )
    disable_dp: bool = field(
        default=False,
        metadata={"help": "Train without clipping and noise, with the same sampling and losses. Off by default."},
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={
            "help": "FOR TESTS ONLY: make sampling and noise repeatable. The run then protects nobody, and its report "
            "says so. Off by default."
        },
    )

    def __post_init__(self) -> None:
        if self.disable_dp:
            for one in fields(self):
                value = getattr(self, one.name)
                if one.name in ONLY_PRIVATE and value != one.default:
                    refuse(f"--{one.name}", value, NOT_READ)
        with renamed(FLAGS):
            self.settings()

    def settings(self, clipping: Clipping = FLAT) -> PrivacySettings | None:
        """The same settings as the engine takes them; None without privacy."""
        if self.disable_dp:
            return None
        return PrivacySettings(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            clipping=clipping,
            register=self.register,
            noise_bands=noise_bands_of(self.noise_bands),
        )
