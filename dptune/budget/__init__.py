"""An append-only file of what several stages spend on the same private data, and their epsilon together.

A generator trained with DP-SGD and a histogram of its training data are two releases. Each has an epsilon, and anyone
who sees both learns from both. Their privacy loss distributions are composed (dp-accounting). The result is less than
the sum of the epsilons and more than the larger one.

    python -m dptune.budget budget.jsonl --delta 5e-7

prints each stage and the total. A stage is entered before it spends anything. So after a crash the file may count a
release that never happened, but never misses one.

With a limit, the file is a **register** of everything that is released from one data set. A training then reserves all
steps that it may take, before its first one, and is refused if the total would exceed the limit. Every training on the
data names the register (`--register`). Only `close` gives back steps that a training did not take.

Without a limit, a training is entered as the path of its ledger, which is read when epsilon is computed, so all its
steps count, including repeated ones. Entering a training makes an empty ledger. If the ledger is missing later, nobody
knows what the training spent, and the file is refused. If lines of the ledger say that there is no guarantee
(`Ledger.reasons`), the whole has none.

No torch in this file.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dptune._validate import present, refuse, require_delta, require_positive
from dptune._words import counted
from dptune.accounting import Spend, compose
from dptune.accounting.rounding import rounded_up
from dptune.budget.stages import (
    CLOSED,
    GAUSSIAN,
    LIMIT,
    NOBODY,
    STATED,
    TRAINING,
    WITHOUT,
    Stage,
    append_stage,
    read_stages,
)
from dptune.ledger import Ledger, begin_ledger, has_begun
from dptune.published import PUBLISH_NAME
from dptune.run.lock import FolderLock

_NAME_WIDTH = 30


class Limit(NamedTuple):
    """The most that all stages may spend together.

    Attributes:
        epsilon: above 0.
        delta: in (0, 1).
    """

    epsilon: float
    delta: float


class Budget:
    """The stages entered in the file at `path`. Entering the first stage, or a limit, makes the file.

    Raises:
        InvalidArgument: a line is not an entry. A torn last line is ignored, because its stage released nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        read_stages(self.path)

    @classmethod
    def register(cls, path: str | os.PathLike[str]) -> Budget:
        """The file at `path`, which must have a limit.

        Raises:
            InvalidArgument: there is no such file, or it has no limit.
        """
        budget, make = cls(path), "python -m dptune.budget FILE --limit EPSILON --delta DELTA"
        if not budget.path.is_file():
            refuse("register", str(path), f"there is no such file; {make} makes one")
        if budget.limit is None:
            refuse("register", str(path), f"has no limit, so it can refuse nothing; {make} sets one")
        return budget

    @property
    def stages(self) -> list[Stage]:
        """The stages entered so far, read anew each time, because other programs may enter stages too."""
        return _counted(read_stages(self.path))

    @property
    def limit(self) -> Limit | None:
        """The most that all stages may spend: the latest one that was set; None if the file only adds up."""
        limits = [line for line in read_stages(self.path) if line.kind == LIMIT]
        if not limits:
            return None
        return Limit(present(limits[-1].epsilon, "limit"), present(limits[-1].delta, "delta"))

    def set_limit(self, epsilon: float, delta: float) -> None:
        """Set, raise or lower the limit. Earlier limits stay in the file.

        Raises:
            InvalidArgument: a value outside its range; or a training was entered without its steps and has not
                finished, so that nobody can tell how many are to come.
        """
        require_positive("epsilon", epsilon)
        require_delta(delta)
        with self._alone_in_file():
            for stage in self.stages:
                if stage.kind == TRAINING and not stage.reserved and not self._has_finished(stage):
                    told = f"cannot hold while {stage.stage} has not finished: it may take any number of steps"
                    refuse("--limit", epsilon, f"{told}; set the limit afterwards")
            append_stage(self.path, Stage("limit", NOBODY, LIMIT, epsilon=float(epsilon), delta=float(delta)))

    def reserve(self, ledger: str | os.PathLike[str], spends: Sequence[Spend], *, unit: str, resumes: bool) -> None:
        """Enter all steps that a training may take, before the first of this launch.

        The stage is named after the ledger's folder. A training that resumes, or that starts where one took no step,
        replaces its own entry; another one is added.

        Args:
            ledger: path of its ledger.
            spends: all steps: those in the ledger, and those to come.
            unit: whose presence its epsilon hides.
            resumes: whether the training resumes.

        Raises:
            InvalidArgument: the total would exceed the limit, or has no bound; a stage protects another unit; or the
                training is closed.
        """
        with self._alone_in_file():
            entry, stages = self._reservation(ledger, spends, unit=unit, resumes=resumes)
            self._require_within_limit(stages)
            append_stage(self.path, entry)

    def require_room(
        self, ledger: str | os.PathLike[str], spends: Sequence[Spend], *, unit: str, resumes: bool
    ) -> float:
        """The epsilon of everything together if a training took these steps; nothing is entered.

        For the arguments and errors see `reserve`.
        """
        return self._require_within_limit(self._reservation(ledger, spends, unit=unit, resumes=resumes)[1])

    def _reservation(
        self, ledger: str | os.PathLike[str], spends: Sequence[Spend], *, unit: str, resumes: bool
    ) -> tuple[Stage, list[Stage]]:
        """The entry of a training, and all stages that count once it is entered, the entry last."""
        lines, where = read_stages(self.path), self._relative(ledger)
        name, own = PurePosixPath(where).parent.as_posix(), [line for line in lines if line.ledger == where]
        if own and resumes and own[-1].kind == CLOSED:
            refuse("register", str(self.path), f"{name} is closed there, so it cannot resume; begin a new run")
        replaces = own and (resumes or (Path(ledger).is_file() and not has_begun(ledger)))
        release = own[-1].release if replaces else str(len(lines))
        entry = Stage(name, unit, TRAINING, ledger=where, reserved=tuple(spends), release=release)
        self._require_one_unit(entry, _counted(lines))
        return entry, _counted([*lines, entry])

    def close(self, stage: str) -> None:
        """Count only the steps in the ledger of a training from now on. It can never resume.

        Args:
            stage: its name, as `describe` shows it, or its folder.

        Raises:
            InvalidArgument: no training of this name reserved steps, several did, its ledger is missing, it is running,
                or it ended early because of what it had learned, so that all of its planned steps count.
        """
        with self._alone_in_file(), FolderLock() as lock:
            found = [one for one in self.stages if one.stage in (stage, self._relative(stage)) and one.reserved]
            if len(found) != 1:
                told = f"{len(found)} trainings of this name reserved steps"
                refuse("stage", stage, f"{told}; give the name of one as python -m dptune.budget {self.path} shows it")
            if not self._path_of(found[0]).is_file():
                refuse("stage", stage, f"its ledger {found[0].ledger} is missing, so all reserved steps count")
            lock.take(self._path_of(found[0]).parent)
            ledger = Ledger(self._path_of(found[0]))
            if ledger.reasons:
                refuse("stage", stage, f"its ledger states no guarantee ({ledger.reasons[0]}), so it counts as it is")
            if ledger.unused_steps:
                told = "what it had learned ended it early, so its planned steps count and it has none to give back"
                refuse("stage", stage, told)
            append_stage(self.path, replace(found[0], kind=CLOSED, reserved=tuple(ledger.spends)))

    def enter_training(self, stage: str, ledger: str | os.PathLike[str], *, unit: str) -> None:
        """Enter a DP-SGD training before its first step. Each ledger is entered once, so resuming enters nothing.

        Raises:
            InvalidArgument: a stage in the file protects another unit; the ledger was entered before and is now
                missing, so that a new training would hide what was spent; or the file has a limit, so that a training
                must `reserve` its steps.
        """
        if self.limit is not None:
            refuse("budget", str(self.path), "has a limit: the training must reserve its steps there, as its register")
        entry = Stage(stage, unit, TRAINING, ledger=self._relative(ledger))
        if self._is_new(entry):
            begin_ledger(ledger)
            append_stage(self.path, entry)
        else:
            self._ledger_of(entry)

    def enter_gaussian(self, stage: str, noise_multiplier: float, *, unit: str, release: str | None = None) -> None:
        """Enter one Gaussian release before it is made. Each call counts, but a `release` id counts only once.

        Raises:
            InvalidArgument: the noise multiplier is not above 0, a stage in the file protects another unit, or the
                total would exceed the limit.
        """
        require_positive("noise_multiplier", noise_multiplier)
        self._enter(Stage(stage, unit, GAUSSIAN, noise_multiplier=float(noise_multiplier), release=release))

    def enter_stated(self, stage: str, epsilon: float, delta: float, *, unit: str) -> None:
        """Enter a release that was made elsewhere, by what it states. Epsilons and deltas of such stages are summed.

        Raises:
            InvalidArgument: see `enter_gaussian`.
        """
        require_positive("epsilon", epsilon)
        if delta:
            require_delta(delta)
        self._enter(Stage(stage, unit, STATED, epsilon=float(epsilon), delta=float(delta)))

    def enter_without_privacy(self, stage: str, reason: str, *, release: str | None = None) -> None:
        """Enter something computed from private data without any bound. From then on there is no epsilon.

        Raises:
            InvalidArgument: the file has a limit, which this would exceed.
        """
        self._enter(Stage(stage, NOBODY, WITHOUT, reason=reason, release=release))

    @property
    def reasons(self) -> list[str]:
        """Why there is no guarantee; empty if there is one. See `spends` for errors."""
        return self._reasons(self.stages)

    def spends(self, stage: Stage) -> list[Spend]:
        """What one stage has spent so far, or may spend if it reserved steps; none for a stage of another kind.

        Raises:
            InvalidArgument: the ledger of a training that reserved nothing is missing, so nobody knows what it spent.
        """
        if stage.kind == GAUSSIAN:
            return [Spend(present(stage.noise_multiplier, "noise multiplier"), 1.0, 1)]
        ledger = self._opened(stage)
        return list(stage.reserved) if ledger is None else _larger(stage.reserved, _counted_spends(ledger))

    def epsilon(self, delta: float) -> float | None:
        """Epsilon of all stages together at `delta`; None if there is no guarantee (see `reasons`).

        Raises:
            InvalidArgument: see `spends`; or the file has stages of two units, which were entered at the same time.
        """
        return self._together(self.stages, delta)

    def describe(self, delta: float) -> list[str]:
        """Each stage with its epsilon alone, who entered it and when, the total and the limit, as lines of text."""
        stages = self.stages
        lines = [self._line(entered, delta) for entered in stages]
        total = self._together(stages, delta)
        if total is None or math.isinf(total):
            why = "; ".join(self._reasons(stages)) or "some noise is so small that epsilon is infinite"
            return [*lines, f"{'together':<{_NAME_WIDTH}} NO GUARANTEE ({why})"]
        units = {entered.unit for entered in stages}  # at most one: see _together
        of = "" if self.limit is None else f" of {rounded_up(self.limit.epsilon, trim=True)}"
        return [
            *lines,
            f"{'together':<{_NAME_WIDTH}} epsilon {rounded_up(total)}{of} at delta {delta:g}",
            *(f"for {one}" for one in units),
        ]

    def _together(self, stages: Sequence[Stage], delta: float) -> float | None:
        if self._reasons(stages):
            return None
        for stage in stages[1:]:
            self._require_one_unit(stage, stages[:1])
        stated = [stage for stage in stages if stage.kind == STATED]
        left = delta - sum(stage.delta or 0 for stage in stated)
        spends = [spend for stage in stages for spend in self.spends(stage)]
        if not spends:
            return sum(present(stage.epsilon, "epsilon") for stage in stated) if left >= 0 else math.inf
        if left <= 0:
            return math.inf
        return compose(spends, delta=left) + sum(present(stage.epsilon, "epsilon") for stage in stated)

    def _require_within_limit(self, stages: Sequence[Stage]) -> float:
        """The epsilon of these stages together, of which the last is new; infinite without a limit.

        Raises:
            InvalidArgument: it exceeds the limit.
        """
        limit, name = self.limit, stages[-1].stage
        if limit is None:
            return math.inf
        total = self._together(stages, limit.delta)
        most = f"{rounded_up(limit.epsilon, trim=True)} at delta {limit.delta:g}"
        if total is None:
            refuse("register", str(self.path), f"allows epsilon {most}, but {self._reasons(stages)[0]}")
        if total > limit.epsilon:
            before = self._together(stages[:-1], limit.delta)
            spent = f"{rounded_up(present(before, 'epsilon'))} is spent or reserved"
            told = f"allows epsilon {most}; {spent}, and with {name} it would be {rounded_up(total)}"
            refuse("register", str(self.path), f"{told}: give {name} more noise or fewer steps, or raise the limit")
        return total

    def _line(self, stage: Stage, delta: float) -> str:
        who = f" ({stage.who}, {stage.when})" if stage.who and stage.when else ""
        return f"{stage.stage:<{_NAME_WIDTH}} {self._alone(stage, delta)}{who}"

    def _alone(self, stage: Stage, delta: float) -> str:
        if stage.kind == WITHOUT:
            return f"NO PRIVACY: {stage.reason}"
        if reasons := self._reasons_of(stage):
            return f"NO GUARANTEE: {'; '.join(reasons)}"
        if stage.kind == STATED:
            return f"epsilon {rounded_up(present(stage.epsilon, 'epsilon'))} at delta {stage.delta:g}, as stated"
        spends = self.spends(stage)
        epsilon = f"epsilon {rounded_up(compose(spends, delta=delta))}"
        steps = sum(spend.steps for spend in spends)
        if stage.kind == CLOSED:
            return f"{epsilon}, closed after {counted(steps, 'step')}"
        ledger = self._opened(stage)
        if not stage.reserved or ledger is None:
            return epsilon
        what = "steps" if ledger.turns == ledger.steps else "turns"  # of an example, with noise bands
        return f"{epsilon} reserved, {ledger.turns:,} of {steps:,} {what} taken"

    def _reasons(self, stages: Sequence[Stage]) -> list[str]:
        return [f"{entered.stage}: {reason}" for entered in stages for reason in self._reasons_of(entered)]

    def _reasons_of(self, stage: Stage) -> Sequence[str]:
        if (ledger := self._opened(stage)) is not None:
            return ledger.reasons
        return [present(stage.reason, "reason")] if stage.kind == WITHOUT else []

    def _opened(self, stage: Stage) -> Ledger | None:
        """The ledger of a training; an empty one if it is missing and all steps are reserved or the training is closed.

        None if there is none: the stage is of another kind, or another training has taken its folder since.
        """
        if stage.kind not in (TRAINING, CLOSED):
            return None
        later = [one for one in self.stages if one.ledger == stage.ledger][-1:]
        if any(one.release != stage.release for one in later):
            return None
        return Ledger(self._path_of(stage) if stage.reserved or stage.kind == CLOSED else self._ledger_of(stage))

    def _has_finished(self, stage: Stage) -> bool:
        """Whether a training has published its result, and does not run."""
        folder = self._ledger_of(stage).parent
        with FolderLock() as lock:
            lock.take(folder)
        return (folder / PUBLISH_NAME).is_dir()

    def _path_of(self, stage: Stage) -> Path:
        return self.path.parent / present(stage.ledger, "ledger")

    def _ledger_of(self, stage: Stage) -> Path:
        ledger = self._path_of(stage)
        if not ledger.is_file():
            remedy = "its ledger is missing, so what it spent is not known; put it back (empty, if it never began)"
            refuse("budget", f"{self.path}: {stage.stage} ({stage.ledger})", remedy)
        return ledger

    def _relative(self, ledger: str | os.PathLike[str]) -> str:
        return Path(os.path.relpath(Path(ledger).absolute(), self.path.absolute().parent)).as_posix()

    def _require_one_unit(self, stage: Stage, entered: Sequence[Stage]) -> None:
        others = {one.unit for one in entered if one.kind != WITHOUT} - {stage.unit}
        if others and stage.kind != WITHOUT:
            known = f"{self.path} has stages that protect {sorted(others)[0]}; epsilons of two units cannot be added"
            refuse("unit", stage.unit, f"{known}: keep to that unit, or begin a new file for other data")

    def _is_new(self, stage: Stage) -> bool:
        """Whether `stage` is not entered yet."""
        entered = self.stages
        self._require_one_unit(stage, entered)
        return not any(one.is_same_as(stage) for one in entered)

    def _enter(self, stage: Stage) -> None:
        with self._alone_in_file():
            if self._is_new(stage):
                self._require_within_limit([*self.stages, stage])
                append_stage(self.path, stage)

    @contextmanager
    def _alone_in_file(self) -> Iterator[None]:
        """Keep other programs from entering a stage between the check of the limit and the new line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _counted(lines: Sequence[Stage]) -> list[Stage]:
    """The stages that count: without limits, and each training with the latest of its lines, at the latest place."""
    latest: dict[tuple[str, str | None], int] = {}
    for number, line in enumerate(lines):
        if line.reserved or line.kind == CLOSED:
            latest[present(line.ledger, "ledger"), line.release] = number
    return [
        line
        for number, line in enumerate(lines)
        if line.kind != LIMIT
        and ((not line.reserved and line.kind != CLOSED) or latest[line.ledger or "", line.release] == number)
    ]


def _counted_spends(ledger: Ledger) -> list[Spend]:
    """What a ledger records, and the steps that count though they did not run."""
    return ledger.spends_after(ledger.unused_steps)


def _larger(reserved: Sequence[Spend], taken: Sequence[Spend]) -> list[Spend]:
    """Steps by setting: the reserved ones or, if a training took more, those."""
    steps = _steps_by_setting(reserved) | _steps_by_setting(taken)
    return [spend._replace(steps=count) for spend, count in steps.items()]


def _steps_by_setting(spends: Sequence[Spend]) -> Counter[Spend]:
    """{a setting, as a spend of no steps: its steps, added up}."""
    steps: Counter[Spend] = Counter()
    for spend in spends:
        steps[spend._replace(steps=0)] += spend.steps
    return steps
