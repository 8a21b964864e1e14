"""An append-only record of every noisy step, from which epsilon is computed.

The line of a step is on disk before its gradient leaves the mechanism. So after a crash the ledger may count a step
that was never used, but never misses one.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dptune import accounting
from dptune._files import append_line, atomic_write, sync_folder
from dptune._validate import refuse, require_count
from dptune._words import counted
from dptune.accounting import Cost, Cut, Spend
from dptune.keystream import SECRET
from dptune.sampling import CUT_SAMPLER, CYCLIC_SAMPLER, FIXED_KEY, NOT_SHOWN, SAMPLER

LEDGER_NAME = "ledger.jsonl"  # in the folder of a run
COUNTED_NAME = "counted_steps.json"  # beside the ledger of a run that ended early


class Ledger:
    """The steps recorded at `path`, including those that are already in the file.

    Args:
        path: the file; the first step makes it.
        group_size: maximum number of examples per privacy unit (see `accounting.Spend`) of the steps to record. A line
            states it unless it is 1; lines that are already in the file keep their own.

    With noise bands, a line states their number and the "block": all steps of one launch have the same. A unit's turns
    are counted block by block, see `dptune.correlated_noise`.

    A line without a kind of noise key counts as secret. Earlier versions wrote no kind, whatever the key was: begin a
    new ledger if such a version ran with fixed noise.

    Raises:
        InvalidArgument: a line is not an entry. A torn last line is not counted, because its gradient was never used;
            the next step replaces it. Reading a ledger never changes the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, group_size: int = 1) -> None:
        require_count("group_size", group_size)
        self.path, self.group_size = Path(path), group_size
        # Length of the counted lines in bytes, and what a failed `record` may have left behind them.
        self._counts, self._samplers, self._noise_keys, self._length, self._unfinished = _read(self.path)
        self._blocks = max((settings.block for settings in self._counts), default=0)

    @property
    def steps(self) -> int:
        """Noisy steps recorded so far."""
        return sum(self._counts.values())

    @property
    def samplers(self) -> dict[str, int]:
        """{how batches were drawn: number of steps}."""
        return dict(self._samplers)

    @property
    def noise_keys(self) -> dict[str, int]:
        """{kind of the key that the noise came from: number of steps}; see `Keystream.kind`."""
        return dict(self._noise_keys)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the steps have no guarantee; empty if they have one."""
        return (*_reasons_of_noise(self._noise_keys), *_reasons_of_samplers(self._samplers))

    @property
    def spends(self) -> list[Spend]:
        """The recorded steps, grouped by their settings, in order of first use; of noise bands, the turns of a unit."""
        return self.spends_after(0)

    def spends_after(self, steps: int) -> list[Spend]:
        """`spends`, if so many more steps followed in the latest block; none follow where no step is recorded."""
        latest = max(self._counts, key=lambda settings: settings.block, default=None)
        counts = self._counts + Counter({latest: steps} if latest is not None else {})
        return _added_up(counts)

    @property
    def unused_steps(self) -> int:
        """Steps that count though they did not run, because what ended the run depends on its steps.

        Raises:
            InvalidArgument: the file that says so, beside the ledger, is not one of `count_unused`.
        """
        path = self.path.with_name(COUNTED_NAME)
        if not path.exists():
            return 0
        try:
            counted_steps = json.loads(path.read_bytes())["steps"]
            if type(counted_steps) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            refuse("ledger", str(path), "does not say how many steps count; restore the file from a backup")
        return max(0, counted_steps - self.steps)

    def count_unused(self, steps: int) -> None:
        """Count so many more steps than are recorded, until they run: see `unused_steps`. A file beside the ledger
        says so, for the budgets that read the ledger."""
        with atomic_write(self.path.with_name(COUNTED_NAME)) as file:
            file.write(json.dumps({"steps": self.steps + steps}) + "\n")

    def spends_of_first(self, steps: int) -> list[Spend]:
        """`spends` of the first so many recorded steps, if each launch ended before the next one began."""
        counts: Counter[_Settings] = Counter()
        for settings, count in self._counts.items():
            counts[settings] = min(count, steps - sum(counts.values()))
        return _added_up(counts)

    @property
    def turns(self) -> int:
        """How many of the recorded steps a unit may be in: all of them, or with noise bands, those of its group."""
        return sum(spend.steps for spend in self.spends)

    @property
    def noise_bands(self) -> set[int]:
        """The numbers of noise bands of the recorded steps."""
        return {settings.noise_bands for settings in self._counts}

    def begin_block(self) -> int:
        """The number of a new block, for the steps of a launch with noise bands."""
        self._blocks += 1
        return self._blocks

    def record(
        self,
        *,
        noise_multiplier: float,
        sampling_probability: float,
        clip_norm: float,
        sampler: str = SAMPLER,
        noise_key: str = SECRET,
        cut: Cut | None = None,
        noise_bands: int = 1,
        block: int = 0,
    ) -> None:
        """Append one step and wait until it is on disk. A line names what voids a guarantee: a sampler that is not
        Poisson's under a secret key, and a noise key that is not secret. Where draws are cut, it states at how many
        examples, and the size of the data set, which epsilon depends on too. With noise bands it states their number
        and the launch's `block`, from `begin_block`.

        If a call fails, for example because the disk is full, nothing is counted, and the next call overwrites the
        rest of its line.

        Raises:
            InvalidArgument: something else changed the file since the last call.
        """
        if not _fits(sampler, is_cut=cut is not None):
            refuse("cut", cut, f"does not fit the sampler, {sampler}; give the configuration's for cut draws alone")
        if not _fits_bands(sampler, noise_bands):
            told = f"do not fit the sampler, {sampler}; give the configuration's for cyclic draws alone"
            refuse("noise_bands", noise_bands, told)
        if (noise_bands > 1) != (block > 0):
            refuse("block", block, f"must come from begin_block with noise_bands={noise_bands} above 1, or else be 0")
        entry: dict[str, float | str] = {
            "step": self.steps + 1,
            "noise_multiplier": noise_multiplier,
            "sampling_probability": sampling_probability,
            "clip_norm": clip_norm,
        }
        if self.group_size != 1:
            entry["group_size"] = self.group_size
        if sampler != SAMPLER:
            entry["sampler"] = sampler
        if cut is not None:
            entry |= cut._asdict()
        if noise_bands > 1:
            entry |= {"noise_bands": noise_bands, "block": block}
        if noise_key != SECRET:
            entry["noise_key"] = noise_key
        line = json.dumps(entry, allow_nan=False)
        self._cut_unfinished()
        self._unfinished = f"{line}\n".encode()
        append_line(self.path, line)
        self._length += len(self._unfinished)
        self._unfinished = b""
        settings = _Settings(noise_multiplier, sampling_probability, self.group_size, cut, noise_bands, block)
        self._counts[settings] += 1
        self._samplers[sampler] += 1
        self._noise_keys[noise_key] += 1

    def content(self) -> bytes:
        """The counted lines as bytes, for the copy in a checkpoint.

        Raises:
            InvalidArgument: the file lost some of them.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) < self._length:
            refuse("ledger", str(self.path), f"lost lines while it was in use; {_RESTORE}")
        return content[: self._length]

    def require_continues(self, saved: str | os.PathLike[str], steps: int) -> None:
        """Refuse a ledger that does not begin with the lines of a checkpoint's copy, because its epsilon would be too
        small.

        More steps may follow. They were released, though a crash threw their result away.

        Args:
            saved: the checkpoint's copy of the ledger.
            steps: number of lines that the copy must have.

        Raises:
            InvalidArgument: lines of the copy are missing here or differ, or the copy does not have `steps` lines.
        """
        theirs, ours = (lines.splitlines(keepends=True) for lines in (Path(saved).read_bytes(), self.content()))
        if len(theirs) != steps:
            remedy = f"has {counted(len(theirs), 'line')}, but its checkpoint counts {steps}; use another checkpoint"
            refuse("ledger", str(saved), remedy)
        if len(ours) < steps:
            remedy = f"has {counted(len(ours), 'line')}, but the checkpoint already has {steps}; {_RESTORE}"
            refuse("ledger", str(self.path), remedy)
        for number, (own, copied) in enumerate(zip(ours, theirs, strict=False), start=1):
            if own != copied:
                refuse("ledger", f"{self.path}:{number}", f"differs from the checkpoint's copy; {_RESTORE}")

    def _cut_unfinished(self) -> None:
        """Cut off what a failed `record` left, of this process or an earlier one. Refuse any other change."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._length:
            return
        if size < self._length:
            refuse("ledger", str(self.path), f"lost lines while it was in use; {_RESTORE}")
        with self.path.open("r+b") as file:
            file.seek(self._length)
            if not self._unfinished.startswith(file.read()):
                refuse("ledger", str(self.path), "another process writes to it; give each run a separate folder")
            file.truncate(self._length)

    def cost(self, delta: float) -> Cost:
        """Epsilon of everything recorded, and the accountant that gave it. It holds only if there are no `reasons`."""
        return accounting.account(self.spends, delta=delta)

    def epsilon(self, delta: float) -> float:
        """Epsilon of everything recorded, as the report states it; infinity if there are `reasons` against it."""
        return math.inf if self.reasons else self.cost(delta).epsilon

    def running_epsilon(self, delta: float) -> float:
        """A slightly larger bound than `cost`, for a progress bar; see `accounting.running_epsilon`."""
        return accounting.running_epsilon(self.spends, delta=delta)


def _reasons_of_noise(keys: Mapping[str, int]) -> tuple[str, ...]:
    """Why steps whose noise came from these kinds of keys have no guarantee."""
    reason = "the noise of {} came from a {} key, so anyone can reproduce it"
    return tuple(reason.format(counted(count, "step"), kind) for kind, count in keys.items() if kind != SECRET)


def _reasons_of_samplers(samplers: Mapping[str, int]) -> tuple[str, ...]:
    """Why steps with these samplers, by name, have no guarantee."""
    known = {
        FIXED_KEY: "the batches of {} were drawn under a fixed key, so anyone can tell who was drawn",
        NOT_SHOWN: "nothing shows that {} got Poisson draws: give PrivateStep its sampler",
    }
    others = {
        name: f"the batches of {{}} were drawn by an unknown sampler, {name}" for name in samplers if name not in _KNOWN
    }
    reasons = others | known
    return tuple(reasons[name].format(counted(samplers[name], "step")) for name in reasons if samplers.get(name))


# Not from a checkpoint: its copy lacks the steps that were released after it.
_RESTORE = "epsilon would be too small; restore the file from a backup that has every line"


_KNOWN = (SAMPLER, CUT_SAMPLER, CYCLIC_SAMPLER)  # the samplers whose cost is known


class _Settings(NamedTuple):
    """What the cost of a line's step depends on; block 0 is that of all steps with independent noise."""

    noise_multiplier: float
    sampling_probability: float
    group_size: int
    cut: Cut | None
    noise_bands: int = 1
    block: int = 0

    def spend(self, steps: int) -> Spend:
        """What so many steps of one block cost."""
        one = Spend(self.noise_multiplier, self.sampling_probability, steps, self.group_size, self.cut)
        return one.with_bands(self.noise_bands)


def _added_up(counts: Mapping[_Settings, int]) -> list[Spend]:
    """One spend for each setting: what the steps of its blocks cost together."""
    turns: Counter[Spend] = Counter()
    for settings, count in counts.items():
        spend = settings.spend(count)
        turns[spend._replace(steps=0)] += spend.steps
    return [spend._replace(steps=count) for spend, count in turns.items()]


def _settings(entry: dict[str, Any], number: int) -> _Settings:
    """The settings in the entry on line `number`; raises an error if it is not a valid entry."""
    sigma, q = float(entry["noise_multiplier"]), float(entry["sampling_probability"])
    group_size = entry.get("group_size", 1)
    if not (sigma > 0 and 0 < q <= 1 and entry["step"] == number):  # another number: lines are missing or doubled
        raise ValueError
    if type(group_size) is not int or group_size < 1:
        raise ValueError
    return _Settings(sigma, q, group_size, _cut(entry, group_size), *_bands_and_block(entry, q, group_size))


def _bands_and_block(entry: dict[str, Any], q: float, group_size: int) -> tuple[int, int]:
    """The noise bands of an entry and its block; (1, 0) for independent noise."""
    bands, block = entry.get("noise_bands", 1), entry.get("block", 0)
    if not _fits_bands(entry.get("sampler", SAMPLER), bands):
        raise ValueError
    if (bands, block) == (1, 0):
        return 1, 0
    if not (type(bands) is type(block) is int and bands > 1 and block > 0 and bands * q <= 1 and group_size == 1):
        raise ValueError
    return bands, block


def _fits(sampler: str, *, is_cut: bool) -> bool:
    """Whether a line may name this sampler: one of cut draws states the cut, and one of other draws does not."""
    return is_cut == (sampler == CUT_SAMPLER) if sampler in _KNOWN else True


def _fits_bands(sampler: str, noise_bands: int) -> bool:
    """Whether a line may name this sampler: one of cyclic draws states its bands, and one of other draws does not."""
    return (noise_bands > 1) == (sampler == CYCLIC_SAMPLER) if sampler in _KNOWN else True


def _cut(entry: dict[str, Any], group_size: int) -> Cut | None:
    """Where the draw of an entry was cut; None if it was not."""
    found = [entry[name] for name in Cut._fields if name in entry]
    if not _fits(entry.get("sampler", SAMPLER), is_cut=bool(found)):
        raise ValueError
    if not found:
        return None
    if len(found) < len(Cut._fields) or group_size > 1 or any(type(one) is not int or one < 1 for one in found):
        raise ValueError
    return Cut(*found)


def begin_ledger(path: str | os.PathLike[str]) -> None:
    """Make the empty file for a run's steps, so that a lost ledger differs from a run that has not begun.

    An existing file stays as it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    sync_folder(path.parent)


def has_begun(path: str | os.PathLike[str]) -> bool:
    """Whether a step may have been recorded at `path`; an empty file comes from `begin_ledger`."""
    path = Path(path)
    return path.exists() and path.stat().st_size > 0


def _read(path: Path) -> tuple[Counter[_Settings], Counter[str], Counter[str], int, bytes]:
    """(steps by settings, by sampler and by kind of noise key, length of their lines in bytes, torn bytes behind)."""
    counts: Counter[_Settings] = Counter()
    samplers: Counter[str] = Counter()
    noise_keys: Counter[str] = Counter()
    if not path.exists():
        return counts, samplers, noise_keys, 0, b""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            counts[_settings(entry, number)] += 1
            samplers[str(entry.get("sampler", SAMPLER))] += 1
            noise_keys[str(entry.get("noise_key", SECRET))] += 1
        except (ValueError, KeyError, TypeError):
            refuse("ledger", f"{path}:{number}", f"is not a ledger entry; {_RESTORE}")
    return counts, samplers, noise_keys, len(whole), content[len(whole) :]
