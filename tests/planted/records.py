"""What earlier runs found, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tests.planted.fault import Fault
from utils.files.journal import Journal

_FILE = "verdicts.jsonl"


class Records:
    """Verdicts on disk. One holds only for the sources that it was found with; the seconds are a guide for later runs.

    Args:
        folder: where they lie; made if it is missing.
        sources: hash of the sources of this run.
        fresh: whether verdicts of earlier runs are found again.
    """

    def __init__(self, folder: Path, sources: str, *, fresh: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._journal, self._sources = Journal(folder, "", (_FILE,), "verdicts"), sources
        self._caught: dict[str, bool] = {}
        self._seconds: dict[str, float] = {}
        self._sound: set[str] = set()
        for row in self._journal.rows():
            if "fault" in row:
                self._seconds[row["fault"]] = row["seconds"]
            if not fresh and "fault" in row:
                self._caught[row["key"]] = row["caught"]
            elif not fresh and row["key"] == sources:
                self._sound |= set(row["sound"])

    def verdict(self, fault: Fault) -> bool | None:
        """Whether the fault was caught with these sources; None if that is not known."""
        return self._caught.get(self._key(fault))

    def seconds(self, fault: Fault) -> float:
        """How long the fault took when it was last tried, with any sources; 0 if it never was."""
        return self._seconds.get(fault.name, 0.0)

    def unknown(self, tests: Iterable[str]) -> list[str]:
        """Those that were not yet green with these sources and without a fault, each once."""
        return sorted(set(tests) - self._sound)

    def note(self, fault: Fault, *, caught: bool, seconds: float) -> None:
        """Keep a verdict."""
        self._caught[self._key(fault)], self._seconds[fault.name] = caught, seconds
        row = {"fault": fault.name, "key": self._key(fault), "caught": caught, "seconds": round(seconds, 1)}
        self._journal.append(_FILE, row)

    def note_sound(self, tests: Iterable[str]) -> None:
        """Keep that these tests are green without a fault."""
        self._sound |= (green := set(tests))
        self._journal.append(_FILE, {"sound": sorted(green), "key": self._sources})

    def _key(self, fault: Fault) -> str:
        return hashlib.sha256(f"{self._sources} {fault!r}".encode()).hexdigest()
