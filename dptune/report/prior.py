"""What a run starts from: an adapter that was released before, and what its own report guarantees.

The bound of a run holds for every start that is fixed before the run's data are touched. So a start that was trained on
other data, or on public data, changes nothing. If it was trained on the same people's data, the start has told about
them already: a person in both is protected by the sum of the epsilons and deltas (basic composition). A start without a
bound of its own could tell everything, so it must be declared public.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dptune._validate import refuse
from dptune.published import PUBLISH_NAME

_BOUND = ("epsilon", "delta", "privacy_unit")


@dataclass(frozen=True, kw_only=True)
class PriorRelease:
    """An earlier release that a run starts from.

    Attributes:
        name: its name, as it may be published.
        sha256: of its files; None for what an earlier report lists without one.
        epsilon, delta: its own guarantee; None without one.
        privacy_unit: whose presence that guarantee hides; None without one.
        declared_public: whether the person who ran the training declared that it was trained on public data alone.
    """

    name: str
    sha256: str | None
    epsilon: float | None
    delta: float | None
    privacy_unit: str | None
    declared_public: bool


def read_priors(
    folder: Path, report_name: str, *, name: str, sha256: str, declared_public: bool
) -> tuple[PriorRelease, ...]:
    """The release in `folder`, and after it those that it started from itself.

    Args:
        folder: holds the adapter. Its report lies beside it, or in its folder `publish`.
        report_name: file name of the report.
        name, sha256, declared_public: see `PriorRelease`.

    Raises:
        InvalidArgument: its report is damaged.
    """
    files = [folder / report_name, folder / PUBLISH_NAME / report_name]
    file = next((one for one in files if one.is_file()), None)
    report = {} if file is None else _read(file)
    bound = {key: report.get(key) if report.get("guarantee") == "dp" else None for key in _BOUND}
    own = PriorRelease(name=name, sha256=sha256, declared_public=declared_public, **bound)
    return (own, *(PriorRelease(**one) for one in report.get("starts_from", ())))


def together(
    epsilon: float, delta: float, privacy_unit: str, priors: tuple[PriorRelease, ...]
) -> tuple[float, float] | None:
    """(epsilon, delta) of a run and its priors for someone in the data of all; None if a unit is another one, or if no
    prior has a bound."""
    bounded = [one for one in priors if one.epsilon is not None and one.delta is not None]
    if not bounded or any(one.privacy_unit != privacy_unit for one in bounded):
        return None
    return epsilon + sum(one.epsilon or 0 for one in bounded), delta + sum(one.delta or 0 for one in bounded)


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    if not _is_report(report):
        refuse("path", str(file), "is no readable privacy report; restore it")
    return dict(report)


def _is_report(report: object) -> bool:
    """Whether it has the fields that are read here, and a bound if it claims one."""
    if not isinstance(report, dict) or report.get("guarantee") not in ("dp", "none"):
        return False
    numbers = all(isinstance(report.get(key), int | float) for key in ("epsilon", "delta"))
    bounded = numbers and isinstance(report.get("privacy_unit"), str)
    known = {one.name for one in fields(PriorRelease)}
    before = report.get("starts_from", [])
    whole = isinstance(before, list) and all(isinstance(one, dict) and set(one) == known for one in before)
    return whole and (bounded or report["guarantee"] == "none")
