r"""An append-only file of what several stages spend on the same private data, and their epsilon together.

A generator trained with DP-SGD and a histogram of its training data are two releases. Each has an epsilon, and anyone
who sees both learns from both. Their privacy loss distributions are composed (dp-accounting). The result is less than
the sum of the epsilons and more than the larger one.

    python -m dptune.budget budget.jsonl --delta 5e-7

prints each stage and the total. A stage is entered before it spends anything. So after a crash the file may count a
release that never happened, but never misses one. A training is entered as the path of its ledger, which is read when
epsilon is computed, so all its steps count, including repeated ones. Entering a training makes an empty ledger. If the
ledger is missing later, nobody knows what the training spent, and the file is refused. If lines of the ledger say that
there is no guarantee (`Ledger.reasons`), the whole has none.

No torch in this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dptune._files import append_line
from dptune._validate import InvalidArgument, present, refuse, require_positive
from dptune.accounting import Spend, compose
from dptune.accounting.rounding import rounded_up
from dptune.ledger import Ledger, begin_ledger

_TRAINING, _GAUSSIAN, _WITHOUT = "training", "gaussian", "without privacy"


@dataclass(frozen=True)
class Stage:
    """One line of the file.

    Attributes:
        stage: the stage's name, shown to the user.
        unit: whose presence its epsilon hides.
        kind: "training" (see `ledger`), "gaussian" (see `noise_multiplier`) or "without privacy" (see `reason`).
        ledger: path of a training's ledger, relative to the budget file's folder.
        noise_multiplier: of one Gaussian release: the noise's standard deviation, divided by the sensitivity.
        reason: why the stage voids the whole guarantee.
        release: unique id of the release, so that it is entered only once; None if it needs no id.
    """

    stage: str
    unit: str
    kind: str
    ledger: str | None = None
    noise_multiplier: float | None = None
    reason: str | None = None
    release: str | None = None

    def is_same_as(self, other: Stage) -> bool:
        """Whether both have the same ledger, release or reason, so that they count only once."""
        one_ledger = self.ledger is not None and self.ledger == other.ledger
        one_release = self.release is not None and self.release == other.release
        return one_ledger or one_release or (self.kind == _WITHOUT and self == other)


class Budget:
    """The stages entered in the file at `path`. Entering the first stage makes the file.

    Raises:
        InvalidArgument: a line is not an entry. A torn last line is ignored, because its stage released nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _read(self.path)

    @property
    def stages(self) -> list[Stage]:
        """The stages entered so far, read anew each time, because other programs may enter stages too."""
        return _read(self.path)

    def enter_training(self, stage: str, ledger: str | os.PathLike[str], *, unit: str) -> None:
        """Enter a DP-SGD training before its first step. Each ledger is entered once, so resuming enters nothing.

        Raises:
            InvalidArgument: a stage in the file protects another unit; or the ledger was entered before and is now
                missing. A new training would hide what was spent.
        """
        where = Path(os.path.relpath(Path(ledger).absolute(), self.path.absolute().parent)).as_posix()
        entry = Stage(stage, unit, _TRAINING, ledger=where)
        if self._is_new(entry):
            begin_ledger(ledger)
            self._append(entry)
        else:
            self._ledger_of(entry)

    def enter_gaussian(self, stage: str, noise_multiplier: float, *, unit: str, release: str | None = None) -> None:
        """Enter one Gaussian release before it is made. Each call counts, but a `release` id counts only once.

        Raises:
            InvalidArgument: the noise multiplier is not above 0, or a stage in the file protects another unit.
        """
        require_positive("noise_multiplier", noise_multiplier)
        self._enter(Stage(stage, unit, _GAUSSIAN, noise_multiplier=float(noise_multiplier), release=release))

    def enter_without_privacy(self, stage: str, reason: str, *, release: str | None = None) -> None:
        """Enter something computed from private data without any bound. From then on there is no epsilon."""
        self._enter(Stage(stage, "nobody", _WITHOUT, reason=reason, release=release))

    @property
    def reasons(self) -> list[str]:
        """Why there is no guarantee; empty if there is one. See `spends` for errors."""
        return self._reasons(self.stages)

    def spends(self, stage: Stage) -> list[Spend]:
        """What one stage has spent so far.

        Raises:
            InvalidArgument: the ledger of a training is missing, so nobody knows what it spent.
        """
        if stage.kind == _GAUSSIAN:
            return [Spend(present(stage.noise_multiplier, "noise multiplier"), 1.0, 1)]
        if stage.kind == _WITHOUT:
            return []
        return self._opened(stage).spends

    def epsilon(self, delta: float) -> float | None:
        """Epsilon of all stages together at `delta`; None if there is no guarantee (see `reasons`).

        Raises:
            InvalidArgument: see `spends`; or the file has stages of two units, which were entered at the same time.
        """
        return self._together(self.stages, delta)

    def describe(self, delta: float) -> list[str]:
        """Each stage with its epsilon alone, and the total, as lines of text for the user."""
        stages = self.stages
        lines = [f"{entered.stage:<32} {self._alone(entered, delta)}" for entered in stages]
        total = self._together(stages, delta)
        if total is None or math.isinf(total):
            why = "; ".join(self._reasons(stages)) or "some noise is so small that epsilon is infinite"
            return [*lines, f"{'together':<32} NO GUARANTEE ({why})"]
        units = {entered.unit for entered in stages}  # at most one: see _together
        return [
            *lines,
            f"{'together':<32} epsilon {rounded_up(total)} at delta {delta:g}",
            *(f"for {one}" for one in units),
        ]

    def _together(self, stages: Sequence[Stage], delta: float) -> float | None:
        if self._reasons(stages):
            return None
        for stage in stages[1:]:
            self._require_one_unit(stage, stages[:1])
        return compose([spend for stage in stages for spend in self.spends(stage)], delta=delta)

    def _alone(self, stage: Stage, delta: float) -> str:
        if stage.kind == _WITHOUT:
            return f"NO PRIVACY: {stage.reason}"
        if reasons := self._reasons_of(stage):
            return f"NO GUARANTEE: {'; '.join(reasons)}"
        return f"epsilon {rounded_up(compose(self.spends(stage), delta=delta))}"

    def _reasons(self, stages: Sequence[Stage]) -> list[str]:
        return [f"{entered.stage}: {reason}" for entered in stages for reason in self._reasons_of(entered)]

    def _reasons_of(self, stage: Stage) -> Sequence[str]:
        if stage.kind == _TRAINING:
            return self._opened(stage).reasons
        return [present(stage.reason, "reason")] if stage.kind == _WITHOUT else []

    def _opened(self, stage: Stage) -> Ledger:
        return Ledger(self._ledger_of(stage))

    def _ledger_of(self, stage: Stage) -> Path:
        ledger = self.path.parent / present(stage.ledger, "ledger")
        if not ledger.is_file():
            remedy = "its ledger is missing, so what it spent is not known; put it back (empty, if it never began)"
            refuse("budget", f"{self.path}: {stage.stage} ({stage.ledger})", remedy)
        return ledger

    def _require_one_unit(self, stage: Stage, entered: Sequence[Stage]) -> None:
        others = {one.unit for one in entered if one.kind != _WITHOUT} - {stage.unit}
        if others and stage.kind != _WITHOUT:
            known = f"{self.path} has stages that protect {sorted(others)[0]}; epsilons of two units cannot be added"
            refuse("unit", stage.unit, f"{known}: keep to that unit, or begin a new file for other data")

    def _is_new(self, stage: Stage) -> bool:
        """Whether `stage` is not entered yet."""
        entered = self.stages
        self._require_one_unit(stage, entered)
        return not any(one.is_same_as(stage) for one in entered)

    def _enter(self, stage: Stage) -> None:
        if self._is_new(stage):
            self._append(stage)

    def _append(self, stage: Stage) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn(self.path)
        entry = {name: value for name, value in vars(stage).items() if value is not None}
        append_line(self.path, json.dumps(entry, allow_nan=False))


def _read(path: Path) -> list[Stage]:
    if not path.exists():
        return []
    stages = []
    for number, line in enumerate(_content(path).removesuffix(_torn(path)).splitlines(), start=1):
        try:
            stages.append(_stage(json.loads(line)))
        except (ValueError, TypeError):
            refuse("budget", f"{path}:{number}", "is not an entry, so epsilon would be too small; restore the file")
    return stages


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


def _stage(entry: dict[str, object]) -> Stage:
    """The stage of an entry; ValueError or TypeError if it is not a valid one."""
    stage = Stage(**entry)  # type: ignore[arg-type]
    needed = {_TRAINING: stage.ledger, _GAUSSIAN: stage.noise_multiplier, _WITHOUT: stage.reason}
    if needed[stage.kind] is None if stage.kind in needed else True:
        raise ValueError
    if stage.noise_multiplier is not None and not stage.noise_multiplier > 0:
        raise ValueError
    return stage


def main(argv: Sequence[str] | None = None) -> None:
    """Print the epsilon of each stage of a budget file, and of all together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget_file", help="the budget.jsonl of a pipeline")
    parser.add_argument("--delta", type=float, required=True, help="probability with which the bound may fail")
    given = parser.parse_args(argv)
    try:
        if not Path(given.budget_file).is_file():
            refuse("budget_file", given.budget_file, "there is no such file; give the budget.jsonl of a pipeline")
        print(*Budget(given.budget_file).describe(given.delta), sep="\n")
    except InvalidArgument as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
