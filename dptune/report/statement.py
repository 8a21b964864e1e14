"""What a run guarantees, as one value, and the privacy report that states it.

The statement holds only what may be published: settings that were chosen before the data were seen, and what follows
from them. It has no field for anything measured on the data (losses, norms, clipped fractions).
"""

from __future__ import annotations

import json
import math
import os
import platform
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeGuard

from dptune._files import atomic_write
from dptune._validate import present, refuse
from dptune.accounting import ADJACENCY, Cut, Spend, account
from dptune.clipping_styles import clipping_in_words
from dptune.correlated_noise import CorrelatedNoise
from dptune.keystream import FIXED
from dptune.ledger import Ledger
from dptune.mechanism import PrivacyConfig, cut_of, sampling_probability
from dptune.noise import GaussianNoise
from dptune.report.prior import PriorRelease
from dptune.sampling import CUT_SAMPLER, CYCLIC_SAMPLER, METHOD_OF_EXAMPLES, SAMPLER, Parts

REPORT_NAME = "privacy_report.json"


def versions(extra: Iterable[str] = ()) -> dict[str, str]:
    """{name: version} of Python, torch, dp-accounting, dptune and the distributions in `extra`, as pip names them."""
    found = {"python": platform.python_version()}
    for name in ("torch", "dp-accounting", "dptune", *extra):
        found[name] = _version(name)
    return found


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """The fields of `privacy_report.json`, in its order.

    Attributes:
        epsilon: spent by all steps that ran, at `delta`; None without a guarantee.
        delta: probability with which the bound by epsilon may fail; None if none was set.
        noise_multiplier: standard deviation of the noise on the clipped sum, divided by `clip_norm`; None without
            noise.
        clip_norm: maximum L2 norm of one unit's gradient in the sum (of the first step if clipping is adaptive); None
            without clipping.
        clipping: the clipping style, in words.
        sampling_probability: probability with which each example (or author, see `sampled`) enters a step's batch; with
            weights, the largest one, which epsilon is computed from.
        expected_batch_size: average batch size before any cut: `sampling_probability` times `num_examples`; less with
            weights.
        steps: noisy steps that ran and were recorded.
        repeated_steps: how many of `steps` a crash threw away, so that they ran again. They are not part of the
            result; `epsilon` counts them.
        unused_steps: planned steps that did not run because held-out rows ended the training. `epsilon` counts them:
            how many steps run depends on the noisy steps before, so only the bound of the whole plan holds.
        num_examples: size of the training set; published.
        sampled: what is drawn, clipped as one and counted: "examples" or "authors".
        privacy_unit: whose presence is hidden, for example "one training example".
        method: how a privacy unit enters a step.
        group_size: maximum number of examples of one privacy unit; `epsilon` covers all of them together.
        adjacency: how neighbouring data sets differ, for example "add or remove one privacy unit".
        accountant: the method that computed epsilon from the steps.
        sampler: how batches were drawn.
        noise_source: where the noise's randomness came from, in the launch that made the statement.
        guarantee: "dp" or "none".
        reasons: why there is no guarantee; empty exactly if there is one.
        starts_from: earlier releases that the training started from, the latest first. `epsilon` does not count them.
        versions: versions of the software that ran, see `versions`.
        parts: the sizes and weights of the parts of the training set; None if all examples are drawn alike.
        max_batch: the number of examples that draws were cut at; None if they were not cut.
        noise_bands: the number of steps over which noise was correlated, and of groups that took turns; 1 for
            independent noise. `sampling_probability` is that of an example whose group is not known.
        average: what the released weights average, in words; None if they are the weights after one step. An average of
            private weights costs no epsilon.

    Raises:
        AssertionError: the statement contradicts itself (checked under `python -O` too): a guarantee with reasons
            against it, without noise or clipping, or with an epsilon that is not finite; no guarantee, but an epsilon
            or no reason; or more repeated steps than steps.
    """

    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None
    clip_norm: float | None
    clipping: str = "flat"
    sampling_probability: float
    expected_batch_size: float
    steps: int
    repeated_steps: int = 0
    unused_steps: int = 0
    num_examples: int
    sampled: str = "examples"
    privacy_unit: str
    method: str = METHOD_OF_EXAMPLES
    group_size: int = 1
    adjacency: str
    accountant: str
    sampler: str
    noise_source: str
    guarantee: Literal["dp", "none"]
    reasons: tuple[str, ...] = ()
    starts_from: tuple[PriorRelease, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    parts: Parts | None = None
    max_batch: int | None = None
    noise_bands: int = 1
    average: str | None = None

    @property
    def cut(self) -> Cut | None:
        """The limit on draws, as the accounting takes it."""
        return cut_of(self.max_batch, self.num_examples)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", tuple(self.reasons))
        _must(self.guarantee in ("dp", "none"), f"guarantee {self.guarantee!r} is neither 'dp' nor 'none'")
        _must(1 <= self.group_size <= self.num_examples, f"groups of {self.group_size} among {self.num_examples}")
        _must(0 <= self.repeated_steps <= self.steps, f"{self.repeated_steps} of {self.steps} steps repeated")
        _must(self.unused_steps >= 0, f"{self.unused_steps} unused steps")
        if self.max_batch is not None:
            _must(self.max_batch >= self.expected_batch_size, f"draws cut at {self.max_batch}, below their mean")
        _must(self.noise_bands >= 1, f"{self.noise_bands} noise bands")
        if self.guarantee == "none":
            _must(bool(self.reasons) and all(self.reasons), "no guarantee needs its reasons")
            _must(self.epsilon is None, "no guarantee has no epsilon")
            return
        _must(not self.reasons, f"a guarantee with reasons against it: {self.reasons}")
        _must(_finite(self.epsilon), "a guarantee needs a finite epsilon")
        _must(_positive(self.delta) and self.delta < 1, "a guarantee needs a delta between 0 and 1")
        _must(_positive(self.noise_multiplier) and _positive(self.clip_norm), "a guarantee needs noise and clipping")
        _must(0 < self.sampling_probability <= 1, "a guarantee needs a sampling probability in (0, 1]")
        expected = self.sampling_probability * (self.parts.effective_size if self.parts else self.num_examples)
        _must(math.isclose(expected, self.expected_batch_size, rel_tol=1e-6), "q * n is not the expected batch size")
        often = self.noise_bands * self.sampling_probability
        _must(self.noise_bands == 1 or often <= 1, f"units are drawn with probability {often} when it is their turn")

    def spend(self, steps: int) -> Spend:
        """What so many steps of one launch cost, as the accounting takes it.

        Raises:
            RuntimeError: they have no noise.
        """
        sigma = present(self.noise_multiplier, "noise multiplier")
        one = Spend(sigma, self.sampling_probability, steps, self.group_size, self.cut)
        return one.with_bands(self.noise_bands)


def state_privacy(
    config: PrivacyConfig,
    ledger: Ledger,
    noise: GaussianNoise | CorrelatedNoise,
    *,
    privacy_unit: str,
    repeated_steps: int = 0,
    unused_steps: int = 0,
    method: str = METHOD_OF_EXAMPLES,
    sampled: str = "examples",
    packages: Iterable[str] = (),
) -> PrivacyStatement:
    """What a private run guarantees: the epsilon of all steps in its ledger, at its configuration's delta.

    There is no guarantee if the ledger has a reason against it, if the noise's key is fixed, or if epsilon is infinite.

    Args:
        config: the mechanism that ran.
        ledger: every noisy step that was taken.
        noise: the source of the noise.
        privacy_unit: whose presence is hidden.
        repeated_steps: how many of the ledger's steps a crash threw away.
        unused_steps: planned steps that did not run; see `PrivacyStatement`.
        method, sampled: see `PrivacyStatement`.
        packages: distributions whose versions are listed too.

    Raises:
        InvalidArgument: the ledger has steps of another group size than the configuration. Its epsilon would be that
            of another privacy unit.
    """
    _require_ledger_of(config, ledger)
    cost = account(spends_with_unused(config, ledger, unused_steps), delta=config.delta)
    reasons = _reasons(ledger, noise, cost.epsilon)
    return PrivacyStatement(
        epsilon=None if reasons else cost.epsilon,
        delta=config.delta,
        noise_multiplier=config.noise_multiplier,
        clip_norm=config.clip_norm,
        clipping=clipping_in_words(config.clipping),
        sampling_probability=config.sampling_probability,
        expected_batch_size=config.expected_batch_size,
        steps=ledger.steps,
        repeated_steps=repeated_steps,
        unused_steps=unused_steps,
        num_examples=config.num_examples,
        privacy_unit=privacy_unit,
        group_size=config.group_size,
        adjacency=ADJACENCY,
        accountant=cost.accountant,
        sampler=_sampler_in_words(ledger.samplers, config.parts, config.max_batch, sampled, config.noise_bands),
        noise_source=noise.source,
        guarantee="none" if reasons else "dp",
        reasons=reasons,
        versions=versions(packages),
        method=method,
        sampled=sampled,
        parts=config.parts,
        max_batch=config.max_batch,
        noise_bands=config.noise_bands,
    )


def _require_ledger_of(config: PrivacyConfig, ledger: Ledger) -> None:
    """Refuse a ledger whose steps are of another mechanism."""
    for spend in ledger.spends:
        if spend.group_size != config.group_size:
            remedy = f"the configuration says {config.group_size}; open it with Ledger(path, group_size=...)"
            refuse("ledger", f"{ledger.path} with a group size of {spend.group_size}", remedy)
        if spend.cut != config.cut:
            refuse("ledger", str(ledger.path), f"has draws cut at {spend.cut}, but the configuration says {config.cut}")
    for bands in ledger.noise_bands - {config.noise_bands}:
        told = f"has steps of {bands} noise bands, but the configuration says {config.noise_bands}"
        refuse("ledger", str(ledger.path), told)


def _reasons(ledger: Ledger, noise: GaussianNoise | CorrelatedNoise, epsilon: float) -> tuple[str, ...]:
    """Why a run guarantees nothing; empty if it does."""
    reasons = ledger.reasons
    if not (noise.keystream.secret or FIXED in ledger.noise_keys):  # no step has said so yet
        reasons = ("the noise came from a fixed key, so anyone can reproduce it", *reasons)
    if math.isinf(epsilon):
        reasons = (*reasons, "the noise is so small that epsilon is infinite")
    return reasons


def spends_with_unused(run: PrivacyConfig | PrivacyStatement, ledger: Ledger, unused_steps: int) -> list[Spend]:
    """What a run's recorded steps cost, and planned steps that did not run: they count like all others of the run.

    With noise bands they count as the rest of the latest launch.
    """
    if not unused_steps or run.noise_multiplier is None:
        return ledger.spends
    if run.noise_bands > 1 and ledger.steps:
        return ledger.spends_after(unused_steps)
    return [*ledger.spends, run.spend(unused_steps)]


def _sampler_in_words(
    samplers: Mapping[str, int], parts: Parts | None, max_batch: int | None, sampled: str, noise_bands: int = 1
) -> str:
    """How batches were drawn: `samplers` are those of a ledger; with no steps, those of the settings."""
    told = {
        CUT_SAMPLER: f"{CUT_SAMPLER} at {max_batch or 0:,} {sampled}",
        CYCLIC_SAMPLER: f"{CYCLIC_SAMPLER}: {noise_bands} groups of {sampled} take turns",
    }
    planned = CYCLIC_SAMPLER if noise_bands > 1 else SAMPLER if max_batch is None else CUT_SAMPLER
    names = [told.get(name, name) for name in samplers or [planned]]
    weights = f" with weights ({parts.in_words}; the sampling probability is the largest)" if parts else ""
    return f"{', '.join(names)}{weights}"


def state_no_privacy(
    *,
    num_examples: int,
    expected_batch_size: float,
    steps: int,
    privacy_unit: str,
    method: str = METHOD_OF_EXAMPLES,
    sampled: str = "examples",
    packages: Iterable[str] = (),
    parts: Parts | None = None,
    max_batch: int | None = None,
) -> PrivacyStatement:
    """The statement of a run without clipping and noise: no guarantee. For the arguments see `PrivacyStatement`."""
    return PrivacyStatement(
        epsilon=None,
        delta=None,
        noise_multiplier=None,
        clip_norm=None,
        clipping="none",
        sampling_probability=sampling_probability(expected_batch_size, num_examples, parts),
        expected_batch_size=expected_batch_size,
        steps=steps,
        num_examples=num_examples,
        privacy_unit=privacy_unit,
        adjacency=ADJACENCY,
        accountant="none",
        sampler=_sampler_in_words({}, parts, max_batch, sampled),
        noise_source="none",
        guarantee="none",
        reasons=("clipping and noise were turned off",),
        versions=versions(packages),
        method=method,
        sampled=sampled,
        parts=parts,
        max_batch=max_batch,
    )


def write_privacy_report(path: str | os.PathLike[str], statement: PrivacyStatement) -> None:
    """Write `statement` as JSON, whole or not at all. None becomes null; NaN and infinity raise `ValueError`."""
    text = json.dumps(asdict(statement), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_privacy_report(path: str | os.PathLike[str]) -> PrivacyStatement:
    """The statement in a report that `write_privacy_report` wrote.

    Raises:
        InvalidArgument: the file is missing, or is no report, or contradicts itself.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        found["starts_from"] = tuple(PriorRelease(**one) for one in found.get("starts_from", ()))
        if found.get("parts") is not None:
            found["parts"] = Parts(tuple(found["parts"]["sizes"]), tuple(found["parts"]["weights"]))
        return PrivacyStatement(**found)
    except OSError as error:
        refuse("report", str(path), f"cannot be read ({error.strerror}); give the folder of a finished run")
    except (ValueError, TypeError, AssertionError) as error:
        refuse("report", str(path), f"is no privacy report that holds ({error}); restore it from the run")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return _source_version() if name == "dptune" else "not installed"


def _source_version() -> str:
    """dptune's version if it runs from its source tree without installed metadata."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"] if pyproject.is_file() else {}
    return f"{project['version']} (source tree)" if project.get("name") == "dptune" else "unknown"


def _must(condition: bool, message: str) -> None:
    """An `assert` that `python -O` does not remove: nobody must be able to write a false claim."""
    if not condition:
        raise AssertionError(message)


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and value >= 0


def _positive(value: float | None) -> TypeGuard[float]:
    return _finite(value) and value > 0
