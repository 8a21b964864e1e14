"""The lines of a budget file: stages that spend on private data, limits and closed trainings. No torch in this file."""

from __future__ import annotations

import getpass
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from dptune._files import append_line
from dptune._validate import refuse
from dptune.accounting import Cut, Spend

TRAINING, GAUSSIAN, STATED, WITHOUT = "training", "gaussian", "stated", "without privacy"
LIMIT, CLOSED = "limit", "closed"  # lines that are no stages
NOBODY: Final = "nobody"  # the unit of a line that protects nobody


@dataclass(frozen=True)
class Stage:
    """One line of the file.

    Attributes:
        stage: the stage's name, shown to the user.
        unit: whose presence its epsilon hides.
        kind: "training" (see `ledger` and `reserved`), "gaussian" (see `noise_multiplier`), "stated" (see `epsilon`)
            or "without privacy" (see `reason`). "limit" (see `epsilon`) and "closed" (see `ledger`) spend nothing.
        ledger: path of a training's ledger, relative to the budget file's folder.
        noise_multiplier: of one Gaussian release: the noise's standard deviation, divided by the sensitivity.
        reason: why the stage voids the whole guarantee.
        release: unique id of the release, so that it is entered only once; None if it needs no id.
        reserved: all steps that a training may take, repeated ones included; empty if it reserved none.
        epsilon: what a release that was made elsewhere states, or the most that all stages may spend.
        delta: belongs to `epsilon`.
        who: name of the user who entered the line; None in files of earlier versions.
        when: date of the entry, UTC; None in files of earlier versions.
    """

    stage: str
    unit: str
    kind: str
    ledger: str | None = None
    noise_multiplier: float | None = None
    reason: str | None = None
    release: str | None = None
    reserved: tuple[Spend, ...] = ()
    epsilon: float | None = None
    delta: float | None = None
    who: str | None = None
    when: str | None = None

    def is_same_as(self, other: Stage) -> bool:
        """Whether both have the same ledger, release or reason, so that they count only once."""
        one_ledger = self.ledger is not None and self.ledger == other.ledger
        one_release = self.release is not None and self.release == other.release
        return one_ledger or one_release or (self.kind == WITHOUT and self.content == other.content)

    @property
    def content(self) -> dict[str, object]:
        """The fields that say what was released, without who entered it and when."""
        return {name: value for name, value in vars(self).items() if name not in ("who", "when")}


def read_stages(path: Path) -> list[Stage]:
    """All lines of the file, oldest first; none if there is no file. A torn last line is left out.

    Raises:
        InvalidArgument: a line is not an entry.
    """
    if not path.exists():
        return []
    stages = []
    for number, line in enumerate(_content(path).removesuffix(_torn(path)).splitlines(), start=1):
        try:
            stages.append(_stage(json.loads(line)))
        except (ValueError, TypeError):
            told = "is not an entry of a budget file; give another file, or restore this one from a backup"
            refuse("budget", f"{path}:{number}", told)  # without the line, epsilon would be too small
    return stages


def append_stage(path: Path, stage: Stage) -> None:
    """Append a line, with the user's name and the date, and wait until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn(path)
    entry = {name: value for name, value in vars(stage).items() if value not in (None, ())}
    entry |= {"who": _user(), "when": datetime.now(UTC).strftime("%Y-%m-%d")}
    if stage.reserved:
        entry["reserved"] = [_entry_of(spend) for spend in stage.reserved]
    append_line(path, json.dumps(entry, allow_nan=False))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        refuse("budget", str(path), f"cannot be read ({error.strerror}); give a budget.jsonl")


def _torn(path: Path) -> bytes:
    """The rest of a last line that a crash cut short; empty if only its line end is missing."""
    last = _content(path).rpartition(b"\n")[2]
    try:
        _stage(json.loads(last))
    except (ValueError, TypeError):
        return last
    return b""


def _cut_torn(path: Path) -> None:
    """Remove a torn last line. Only called before a line is appended; readers leave the file as it is."""
    if path.exists() and (torn := _torn(path)):
        os.truncate(path, path.stat().st_size - len(torn))


def _stage(entry: Mapping[str, object]) -> Stage:
    """The stage of an entry; ValueError or TypeError if it is not a valid one."""
    if not isinstance(entry, dict) or not entry.keys() <= {one.name for one in fields(Stage)}:
        raise ValueError
    reserved = tuple(_spend(one) for one in entry.get("reserved", ()))
    stage = Stage(**{**entry, "reserved": reserved})
    needed = {
        TRAINING: stage.ledger,
        CLOSED: stage.ledger,
        GAUSSIAN: stage.noise_multiplier,
        WITHOUT: stage.reason,
        STATED: stage.epsilon,
        LIMIT: stage.epsilon,
    }
    if needed[stage.kind] is None if stage.kind in needed else True:
        raise ValueError
    if stage.noise_multiplier is not None and not stage.noise_multiplier > 0:
        raise ValueError
    if stage.epsilon is not None and not (0 < stage.epsilon < math.inf and 0 <= (stage.delta or 0) < 1):
        raise ValueError
    return stage


def _entry_of(spend: Spend) -> dict[str, object]:
    """The steps as JSON values, see `_spend`."""
    cut = {} if spend.cut is None else {"cut": spend.cut._asdict()}
    return {name: value for name, value in spend._asdict().items() if name != "cut"} | cut


def _spend(entry: Mapping[str, Any]) -> Spend:
    """The steps of an entry; ValueError or TypeError if they are no valid ones."""
    spend = Spend(**entry)
    if spend.cut is not None:
        spend = spend._replace(cut=Cut(**entry["cut"]))
    if not (spend.noise_multiplier > 0 and 0 < spend.sampling_probability <= 1 and spend.steps > 0):
        raise ValueError
    return spend


def _user() -> str:
    """The name of the user who runs this program; "unknown" where the system has none, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"
