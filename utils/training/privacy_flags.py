"""Flags of training: noise, clip norm, delta and the privacy unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dptune._validate import refuse, renamed, require_count, require_positive
from dptune.audit.one_run import LEAST_CANARIES
from dptune.bands import bands_within
from dptune.clipping_styles import FLAT, Clipping
from dptune.run.settings import AUTO, PrivacySettings, noise_bands_of
from dptune.units.unit import EXAMPLE, UNIT_GRADIENTS, USER_LEVEL, USER_LEVEL_METHODS, PrivacyUnit

_NO_PRIVACY = "; to train without privacy, give --clip_norm -1 --noise_multiplier -1"
_UNTIL_MEASURED = 1.0  # the plan's clip norm while the real one is open: epsilon does not depend on it


@dataclass
class PrivacyFlags:
    """Everything that decides epsilon, together with the logical batch size and the number of steps."""

    _argument_group_name = "privacy"

    clip_norm: float | Literal["auto"] = field(
        default=1.0,
        metadata={
            "help": "maximum gradient norm per example (or per author); auto: measured before training, just above a "
            "typical norm of texts that the model itself writes, never on your data; see also --noise_multiplier"
        },
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "noise standard deviation / --clip_norm; set both flags to -1 to train without privacy"},
    )
    target_epsilon: float | None = field(
        default=None, metadata={"help": "epsilon to spend: finds the noise for it, instead of --noise_multiplier"}
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "chance that the epsilon bound fails; default: a tenth of 1 / number of examples (authors), "
            "rounded down to a power of ten"
        },
    )
    privacy_unit: str = field(
        default=EXAMPLE,
        metadata={"help": "what is protected: example (one row), or the column of each row's author (all their rows)"},
    )
    examples_per_unit: int | None = field(
        default=None, metadata={"help": "maximum examples per author, k (see --user_level_method)"}
    )
    user_level_method: str = field(
        default=USER_LEVEL,
        metadata={
            "help": "user-level: draw authors and clip the combined gradient of up to k of their examples; "
            "example-level: keep k examples per author, draw and clip single ones, and account for all k",
            "choices": USER_LEVEL_METHODS,
        },
    )
    unit_gradient: str = field(
        default="mean",
        metadata={"help": "combination of an author's gradients before clipping", "choices": UNIT_GRADIENTS},
    )
    max_batch: int | None = field(
        default=None,
        metadata={
            "help": "maximum examples (or authors) per step, over all processes: larger draws are cut, which raises "
            "epsilon; default: draws are not cut"
        },
    )
    noise_bands: str | None = field(
        default=None,
        metadata={
            "help": "correlate noise over so many steps: less noise in the sum of all steps, more in each; rows (or "
            "authors) then take turns in so many groups; 1: independent noise; auto: as many as make the least noise "
            "for --target_epsilon and keep at most 2 GiB of it; default: auto with --target_epsilon, else 1"
        },
    )
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect rows although a column names users: a user with many rows is protected less"},
    )
    register: str | None = field(
        default=None,
        metadata={
            "help": "file with the most that all releases from these data may spend (python -m dptune.budget FILE "
            "--limit EPSILON --delta DELTA makes it); the run is refused if it would exceed that. Default: no limit"
        },
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={"help": "FOR TESTS: seed of repeatable sampling and noise, which protect nobody; the report says so"},
    )

    audit_canaries: int = field(
        default=0,
        metadata={
            "help": "rows of random tokens to add, each learned by a secret fair coin, for `python -m dptune.audit "
            "training`; a run with them cannot be published (default 0)"
        },
    )
    audit_dials: int = field(
        default=0,
        metadata={
            "help": "the same for an adversary who sees every released gradient: rows to add that move one number each "
            "as far as clipping allows, by a secret fair coin; needs --clipping flat or automatic (default 0)"
        },
    )

    def __post_init__(self) -> None:
        off = [not self.is_private, self.noise_multiplier is not None and self.noise_multiplier < 0]
        if any(off) and not all(off):
            given = self.clip_norm if self.clip_norm == AUTO else f"{self.clip_norm:g}"
            remedy = f"--clip_norm is {given}; make both positive, or both -1 to train without privacy"
            refuse("--noise_multiplier", self.noise_multiplier, remedy)
        for name in ("noise_multiplier", "target_epsilon"):
            if self.is_private and getattr(self, name) is not None:
                require_positive(f"--{name}", getattr(self, name), otherwise=_NO_PRIVACY)
        if self.max_batch is not None:
            require_count("--max_batch", self.max_batch)
        with renamed({"noise_bands": "--noise_bands"}):
            self.settings()
        self._check_unit()
        self._check_canaries()

    def settings(self, clipping: Clipping = FLAT, *, trained: int = 1) -> PrivacySettings | None:
        """The flags as the engine takes them; None if clipping and noise are turned off.

        Args:
            clipping: the clipping style.
            trained: number of trained values, which limits automatic noise bands.
        """
        if not self.is_private:
            return None
        return PrivacySettings(
            clip_norm=_UNTIL_MEASURED if self.clip_norm == AUTO else self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            clipping=clipping,
            register=self.register,
            noise_bands=noise_bands_of(self.bands),
            most_noise_bands=bands_within(trained),
        )

    def _check_unit(self) -> None:
        k = self.examples_per_unit
        if self.privacy_unit == EXAMPLE:
            if k is not None:
                refuse("--examples_per_unit", k, "is for authors; name their column with --privacy_unit")
            return
        if self.ignore_users:
            refuse("--ignore_users", True, "contradicts --privacy_unit; leave one out")
        if not self.privacy_unit.strip():
            refuse("--privacy_unit", self.privacy_unit, "give `example`, or the column that names each row's author")
        if k is None:
            refuse("--examples_per_unit", k, "give the maximum examples per author, which --privacy_unit needs")
        require_count("--examples_per_unit", k)
        if self.clip_norm_is_open and self.unit_gradient == "sum" and self.unit.rows_at_once > 1:
            remedy = (
                f"is measured on single rows, but --unit_gradient sum adds up to {k} of them; give a number, or mean"
            )
            refuse("--clip_norm", self.clip_norm, remedy)

    def _check_canaries(self) -> None:
        for flag, count in (("--audit_canaries", self.audit_canaries), ("--audit_dials", self.audit_dials)):
            require_count(flag, count, minimum=0)
            if 0 < count < LEAST_CANARIES:
                refuse(flag, count, f"give 0, or at least {LEAST_CANARIES}")
            if count and self.privacy_unit != EXAMPLE:
                refuse(flag, count, "canaries are rows; leave --privacy_unit out")

    @property
    def is_private(self) -> bool:
        """Whether there are clipping and noise."""
        return self.clip_norm == AUTO or not self.clip_norm < 0

    @property
    def bands(self) -> str:
        """The noise bands that were asked for; those of the default where they were left open."""
        if self.noise_bands is not None:
            return self.noise_bands
        return "1" if self.target_epsilon is None else AUTO

    @property
    def clip_norm_is_open(self) -> bool:
        """Whether the clip norm is still to be measured."""
        return self.clip_norm == AUTO

    @property
    def num_canaries(self) -> int:
        """Rows that an audit adds to the training set."""
        return self.audit_canaries + self.audit_dials

    @property
    def users_flag(self) -> str | None:
        """The flag to recommend for a file that names users; None where such a file is taken."""
        protects_rows = self.is_private and self.privacy_unit == EXAMPLE
        return "--privacy_unit" if protects_rows and not self.ignore_users else None

    @property
    def unit(self) -> PrivacyUnit:
        """What is protected, and how."""
        if self.privacy_unit == EXAMPLE:
            return PrivacyUnit()
        return PrivacyUnit(self.privacy_unit, self.user_level_method, self.examples_per_unit or 1, self.unit_gradient)
