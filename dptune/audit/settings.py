"""The mechanism of a run, as its folder tells it, for an audit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from dptune._validate import present, refuse, require_count, require_positive
from dptune.adapter_files import PEFT_WEIGHTS_NAME, WEIGHTS_NAME
from dptune.audit.games import FLOAT32, Mechanism
from dptune.audit.stand_in import LORA, WHOLE
from dptune.clipping_styles import FLAT, Adaptive, Automatic, Clipping, PerLayer, clipping_in_words
from dptune.published import published_part
from dptune.report.statement import REPORT_NAME, PrivacyStatement, read_privacy_report

_ADAPTERS = (WEIGHTS_NAME, PEFT_WEIGHTS_NAME)
_AS_ONE = (re.compile(r"user-level sampling: .*up to (\d+) of their examples"), re.compile(r"mean over (\d+) views"))


@dataclass(frozen=True)
class Audited:
    """What an audit of a mechanism takes from a run.

    Attributes:
        mechanism: the mechanism.
        sampling_probability: q; with noise bands, that of a turn.
        delta: of the epsilon.
        steps: of the whole run, with noise bands the turns of a unit; None if unknown.
        epsilon: that the run states; None if unknown.
    """

    mechanism: Mechanism
    sampling_probability: float
    delta: float
    steps: int | None = None
    epsilon: float | None = None


def settings_of_run(path: str | Path, *, ranks: int, dtype: str = FLOAT32) -> Audited:
    """The settings in the privacy report of a finished run.

    Clip norms of single layers are replaced by equal shares of the same total, because the stand-in has other layers. A
    run with noise bands costs what its turns cost with independent noise, so those turns are audited instead.

    Args:
        path: the run's folder, or its folder `publish`.
        ranks, dtype: see `Mechanism`; the report does not state them.

    Raises:
        InvalidArgument: there is no report, or it states no guarantee to audit.
    """
    require_count("ranks", ranks)
    folder, statement = published_part(path), statement_of_run(path)
    clip_norm, sigma = (
        present(statement.clip_norm, "clip norm"),
        present(statement.noise_multiplier, "noise multiplier"),
    )
    mechanism = Mechanism(
        noise_multiplier=sigma,
        clip_norm=clip_norm,
        clipping=style_of(statement.clipping, count_noise_of(statement.expected_batch_size, sigma)),
        trained=LORA if any(next(folder.rglob(name), None) for name in _ADAPTERS) else WHOLE,
        group_size=statement.group_size,
        rows_per_unit=_rows_per_unit(statement),
        ranks=ranks,
        dtype=dtype,
    )
    spent = statement.spend(statement.steps + statement.unused_steps)  # with noise bands, a unit's turns
    delta = present(statement.delta, "delta")
    return Audited(mechanism, spent.sampling_probability, delta, spent.steps, statement.epsilon)


def statement_of_run(path: str | Path) -> PrivacyStatement:
    """The privacy statement of a finished run.

    Raises:
        InvalidArgument: there is no report, or it states no guarantee to audit.
    """
    report = published_part(path) / REPORT_NAME
    if not report.is_file():
        refuse(
            "path", str(path), f"holds no {REPORT_NAME}; give the folder of a finished run, or its settings as flags"
        )
    statement = read_privacy_report(report)
    if statement.epsilon is None:
        refuse("path", str(path), f"states no guarantee to audit ({statement.reasons[0]})")
    return statement


def style_of(words: str, count_noise: float) -> Clipping:
    """The clipping style that `clipping_in_words` describes.

    Args:
        words: of a report.
        count_noise: the noise of adaptive clipping's count, which no report states.

    Raises:
        InvalidArgument: the words of a style that is not known here.
    """
    numbers = re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", words)
    if words.startswith("per layer"):
        return PerLayer()
    if words.startswith("automatic") and numbers:
        return Automatic(gamma=float(numbers[0]))
    if words.startswith("adaptive") and numbers:
        return Adaptive(quantile=float(numbers[0]), count_noise=count_noise)
    if words != clipping_in_words(FLAT):
        refuse("words", words, "is no clipping style that this version knows; update dptune")
    return FLAT


def count_noise_of(expected_batch_size: float, noise_multiplier: float) -> float:
    """The default noise of adaptive clipping's count, or if that is too little for sigma, ten times sigma."""
    usual = expected_batch_size / 20
    return usual if 2 * usual > noise_multiplier else 10 * noise_multiplier


def _rows_per_unit(statement: PrivacyStatement) -> int:
    """How many rows are clipped as one: those of an author, and the views of each."""
    found = (pattern.search(statement.method) for pattern in _AS_ONE)
    return math.prod(int(one[1]) for one in found if one)


def style_named(name: str, noise_multiplier: float) -> Clipping:
    """The clipping style with this name and the default settings: flat, per-layer, automatic or adaptive.

    Raises:
        InvalidArgument: another name.
    """
    require_positive("noise_multiplier", noise_multiplier)
    styles: dict[str, Clipping] = {
        "flat": FLAT,
        "per-layer": PerLayer(),
        "automatic": Automatic(),
        "adaptive": Adaptive(count_noise=10 * noise_multiplier),
    }
    if name not in styles:
        refuse("name", name, f"is no clipping style; give one of {', '.join(styles)}")
    return styles[name]
