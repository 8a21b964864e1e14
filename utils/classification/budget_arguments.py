"""Flags of train_classifier.py: epsilon, noise and clip norm."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._aliases import aliases
from dptune._validate import refuse, renamed, require_count, require_delta, require_positive
from dptune.bands import bands_within
from dptune.run.settings import AUTO, PrivacySettings, noise_bands_of
from utils.training.optimization_arguments import MAX_GRAD_NORM

_EPSILON = 8.0
_NO_PRIVACY = "; to train without privacy, leave it and --enable_dp out"


@dataclass
class BudgetArguments:
    """Everything that decides epsilon, with --batch_size and --num_train_epochs."""

    _argument_group_name = "privacy"

    enable_dp: bool = field(default=False, metadata={"help": "train with differential privacy"})
    target_epsilon: float | None = field(
        default=None,
        metadata={"help": f"epsilon, with --enable_dp; default: {_EPSILON:g}, unless --noise_multiplier is given"},
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "noise standard deviation / clip norm with --enable_dp; instead of --target_epsilon"},
    )
    clip_norm: float | None = field(
        default=None,
        metadata={
            "help": "clip norm. With --enable_dp, of each example's gradient; default: measured, just above a typical "
            "norm at the start. Without it, of a step's whole gradient; default: 1",
            "aliases": aliases("max_grad_norm"),
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "probability that the epsilon bound fails; default: a tenth of 1 / number of examples, rounded "
            "down to a power of ten"
        },
    )
    register: str | None = field(
        default=None,
        metadata={
            "help": "file with the most that all releases from these data may spend (python -m dptune.budget FILE "
            "--limit EPSILON --delta DELTA makes it); the run is refused if it would exceed that. Default: no limit"
        },
    )
    max_batch: int | None = field(
        default=None,
        metadata={
            "help": "maximum examples per step, over all processes: larger draws are cut, which raises epsilon; "
            "default: draws are not cut"
        },
    )
    noise_bands: str | None = field(
        default=None,
        metadata={
            "help": "correlate noise over so many steps: less noise in the sum of all steps, more in each; rows then "
            "take turns in so many groups; 1: independent noise; auto: as many as make the least noise for "
            "--target_epsilon and keep at most 2 GiB of it; default: auto with --target_epsilon, else 1"
        },
    )
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect rows although --train_file names users: a user with many rows is protected less"},
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={
            "help": "FOR TESTS: seed for repeatable sampling, noise and dropout. It protects nobody; the report says so"
        },
    )

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            refuse("--target_epsilon", self.target_epsilon, "give --target_epsilon or --noise_multiplier, not both")
        for flag in ("target_epsilon", "noise_multiplier", "clip_norm"):
            if getattr(self, flag) is not None:
                require_positive(f"--{flag}", getattr(self, flag), otherwise=_NO_PRIVACY)
        if self.delta is not None:
            require_delta(self.delta, name="--delta")
        if self.max_batch is not None:
            require_count("--max_batch", self.max_batch)
        with renamed({"noise_bands": "--noise_bands"}):
            noise_bands_of(self.bands)
        if self.noise_bands == AUTO and self.noise_multiplier is not None:
            refuse("--noise_bands", AUTO, "is chosen for --target_epsilon; give that, or a number of bands")

    def settings(self, trained: int) -> PrivacySettings | None:
        """The engine's privacy settings; None without privacy. An open --clip_norm must be measured first.

        Args:
            trained: number of trained values, which limits automatic noise bands.
        """
        if not self.enable_dp:
            return None
        if self.clip_norm is None:
            raise RuntimeError("--clip_norm is not set: measure it before the plan is made")
        return PrivacySettings(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=None if self.noise_multiplier is not None else (self.target_epsilon or _EPSILON),
            delta=self.delta,
            register=self.register,
            noise_bands=noise_bands_of(self.bands),
            most_noise_bands=bands_within(trained),
        )

    @property
    def bands(self) -> str:
        """The noise bands that were asked for; those of the default where they were left open."""
        if self.noise_bands is not None:
            return self.noise_bands
        return AUTO if self.enable_dp and self.noise_multiplier is None else "1"

    @property
    def clip_norm_is_open(self) -> bool:
        """Whether the clip norm is still to be measured."""
        return self.enable_dp and self.clip_norm is None

    @property
    def plain_max_grad_norm(self) -> float | None:
        """The clip norm of a step's whole gradient in training without privacy."""
        return None if self.enable_dp else self.clip_norm or MAX_GRAD_NORM
