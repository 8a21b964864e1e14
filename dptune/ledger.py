"""An append-only record of every noisy step, from which epsilon is computed.

A line is on disk before the gradient it stands for leaves the mechanism, so a crash can make the ledger count a step
that was never used, but not the other way round.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from dptune import accounting
from dptune._files import append_line, sync_folder
from dptune._validate import refuse, require_count
from dptune.accounting import Spend


class Ledger:
    """The steps recorded at `path`; opening a file that has entries counts them.

    Args:
        path: the file; made by the first step.
        group_size: most examples of one privacy unit among those that are sampled (`accounting.Spend`), of the steps
            that will be recorded. A line says it unless it is 1; those in the file keep their own.

    Raises:
        InvalidArgument: a line that is no entry. A torn last line is not counted: its gradient was never used. The
            next step is written in its place; who only reads a ledger leaves it as it is.
    """

    def __init__(self, path: str | os.PathLike[str], *, group_size: int = 1) -> None:
        require_count("group_size", group_size)
        self.path, self.group_size = Path(path), group_size
        # The bytes of the lines that are counted, and what a `record` that failed may have left behind them.
        self._counts, self._length, self._unfinished = _read(self.path)

    @property
    def steps(self) -> int:
        """Noisy steps recorded so far."""
        return sum(self._counts.values())

    @property
    def spends(self) -> list[Spend]:
        """The recorded steps, grouped by their settings, in order of first use."""
        return [Spend(sigma, q, count, group_size) for (sigma, q, group_size), count in self._counts.items()]

    def record(self, *, noise_multiplier: float, sampling_probability: float, clip_norm: float) -> None:
        """Append one step and wait until it is on disk.

        A call that fails (a full disk, say) counts nothing, and the next one writes in its place.

        Raises:
            InvalidArgument: the file is not as the last call left it.
        """
        entry = {
            "step": self.steps + 1,
            "noise_multiplier": noise_multiplier,
            "sampling_probability": sampling_probability,
            "clip_norm": clip_norm,
        }
        if self.group_size != 1:
            entry["group_size"] = self.group_size
        line = json.dumps(entry, allow_nan=False)
        self._cut_unfinished()
        self._unfinished = f"{line}\n".encode()
        append_line(self.path, line)
        self._length += len(self._unfinished)
        self._unfinished = b""
        self._counts[noise_multiplier, sampling_probability, self.group_size] += 1

    def content(self) -> bytes:
        """The lines that are counted, as they stand in the file: what a checkpoint keeps a copy of.

        Raises:
            InvalidArgument: the file lost some of them.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) < self._length:
            refuse("ledger", str(self.path), f"lost lines while it was in use; {_RESTORE}")
        return content[: self._length]

    def require_continues(self, saved: str | os.PathLike[str], steps: int) -> None:
        """Refuse a ledger that does not begin with what a checkpoint recorded: its epsilon would be too small.

        Steps beyond the checkpoint's may follow. They were released, though a crash threw their result away.

        Args:
            saved: the checkpoint's copy of the ledger.
            steps: lines that the copy must have.

        Raises:
            InvalidArgument: lines of the checkpoint are missing here or read otherwise, or the copy is not of `steps`.
        """
        theirs, ours = (lines.splitlines(keepends=True) for lines in (Path(saved).read_bytes(), self.content()))
        if len(theirs) != steps:
            refuse("ledger", str(saved), f"has {len(theirs)} lines, but its checkpoint {steps}; take another one")
        if len(ours) < steps:
            refuse("ledger", str(self.path), f"has {len(ours)} lines, the checkpoint {steps} already; {_RESTORE}")
        for number, (own, copied) in enumerate(zip(ours, theirs, strict=False), start=1):
            if own != copied:
                refuse("ledger", f"{self.path}:{number}", f"reads otherwise than in the checkpoint; {_RESTORE}")

    def _cut_unfinished(self) -> None:
        """Take off what a failed `record` left, this process's or an earlier one's; anything else that is there or not
        there is somebody else's doing."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._length:
            return
        if size < self._length:
            refuse("ledger", str(self.path), f"lost lines while it was in use; {_RESTORE}")
        with self.path.open("r+b") as file:
            file.seek(self._length)
            if not self._unfinished.startswith(file.read()):
                refuse("ledger", str(self.path), "another process writes to it; give each run a folder of its own")
            file.truncate(self._length)

    def epsilon(self, delta: float) -> float:
        """Epsilon of everything recorded, as the report states it."""
        return accounting.compose(self.spends, delta=delta)

    def running_epsilon(self, delta: float) -> float:
        """A slightly larger bound in milliseconds, for a progress bar."""
        return accounting.running_epsilon(self.spends, delta=delta)


# Not from a checkpoint: its copy lacks the steps that ran after it, and they were released.
_RESTORE = "epsilon would be understated; restore the file from a backup that has every line"


_Settings = tuple[float, float, int]  # noise multiplier, sampling probability, group size


def _settings(entry: dict[str, float], number: int) -> _Settings:
    """What the entry on line `number` says; an error where it cannot be one."""
    sigma, q = float(entry["noise_multiplier"]), float(entry["sampling_probability"])
    group_size = entry.get("group_size", 1)
    if not (sigma > 0 and 0 < q <= 1 and entry["step"] == number):  # another step's number: lines are missing or double
        raise ValueError
    if type(group_size) is not int or group_size < 1:
        raise ValueError
    return sigma, q, group_size


def begin_ledger(path: str | os.PathLike[str]) -> None:
    """Make the empty file in which a run's steps will be recorded, so that one that is lost can be told from one that
    has not begun; what is there stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    sync_folder(path.parent)


def has_begun(path: str | os.PathLike[str]) -> bool:
    """Whether a step may have been recorded there: an empty file is from `begin_ledger`."""
    path = Path(path)
    return path.exists() and path.stat().st_size > 0


def _read(path: Path) -> tuple[Counter[_Settings], int, bytes]:
    """Steps by their settings, the bytes that they fill, and what a crash tore off behind them."""
    counts: Counter[_Settings] = Counter()
    if not path.exists():
        return counts, 0, b""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            counts[_settings(json.loads(line), number)] += 1
        except (ValueError, KeyError, TypeError):
            refuse("ledger", f"{path}:{number}", f"not a ledger entry; {_RESTORE}")
    return counts, len(whole), content[len(whole) :]
