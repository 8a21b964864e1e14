"""One training run on one process: ledger, draws, dropout masks, noise, steps, end of the budget and statement.

A training loop calls `begin_step`, then `backward` any number of times, then `finish_step`; the private gradient is
then in `.grad`. The training scripts, `DPTrainer` and the callback for transformers' Trainer all use this object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from dptune.accounting.rounding import rounded_up
from dptune.budget import Budget
from dptune.correlated_noise import CorrelatedNoise
from dptune.flat import released_size
from dptune.keystream import Keystream, new_key
from dptune.ledger import LEDGER_NAME, Ledger, begin_ledger
from dptune.lora import trainable_parameters
from dptune.micro_batch import Items, MicroBatchStats
from dptune.noise import GaussianNoise
from dptune.plain_step import PlainStep
from dptune.randomness import forget_randomness, new_randomness
from dptune.ranks import ALONE, Ranks
from dptune.report.prior import PriorRelease
from dptune.report.statement import PrivacyStatement, state_no_privacy, state_privacy
from dptune.run.checkpoint import TrainingState
from dptune.run.folder import refuse_existing_run
from dptune.run.identity import mechanism_identity, refuse_other_run
from dptune.run.plan import RunPlan, last_step, spends_to_come
from dptune.sampling import PoissonSampler
from dptune.sharding import are_sharded, local_part
from dptune.step import PrivateStep
from dptune.units.batches import AuthorSampler
from dptune.units.unit import Authors, PrivacyUnit

S = TypeVar("S", PoissonSampler, AuthorSampler)
GradientSync = Literal["gather", "reduce"]


_RANKS_CHECKED_EVERY = 10  # steps
_PLANNED = "planned_steps"  # in the mechanism's state of a checkpoint


@dataclass(frozen=True)
class SavedRun:
    """The part of a checkpoint that concerns privacy.

    Attributes:
        step: completed steps.
        ledger: path of the checkpoint's copy of the ledger.
        ledger_steps: number of lines that the copy must have.
        identity: settings that a resumed run must share, see `mechanism_identity`.
        mechanism: what `mechanism_state` returned.
    """

    step: int
    ledger: Path
    ledger_steps: int
    identity: Mapping[str, object]
    mechanism: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, state: TrainingState, checkpoint: Path) -> SavedRun:
        """That part of what `load_checkpoint` read from a checkpoint's folder."""
        return cls(state.step, checkpoint / LEDGER_NAME, state.ledger_steps, state.identity, state.mechanism)


class PrivateRun:
    """A run in its folder. Every rank makes one with the same plan; only rank 0 reads and writes files.

    Call `prepare`, make the optimizer, then use the run as a context manager around the loop. While it is open, it
    records per-example gradients, and no parameter has `requires_grad`.

    Args:
        plan: how the run samples and how many steps it takes. Without privacy, steps neither clip nor add noise.
        run_folder: holds the ledger; made if it is missing.
        ranks: the processes of the run.
        resume_from: the checkpoint to resume. The caller loads its weights.
        identity: settings that a resumed run must share, in addition to the mechanism, as JSON values.
        starts_from: earlier releases that the training starts from, which the statement names.

    Attributes:
        identity: all settings that a resumed run must share.
        ledger: the record of every noisy step; None without privacy and on all ranks but 0.
        last: the step after which the run ends: the planned one, or an earlier one if steps that a crash threw away
            have used up the budget; with noise bands, also if this launch's turns come too late in it.

    Raises:
        InvalidArgument: the folder holds another run, the checkpoint is of another run, or the run would spend more
            than its register allows.
    """

    def __init__(
        self,
        plan: RunPlan,
        run_folder: str | Path,
        ranks: Ranks = ALONE,
        *,
        resume_from: SavedRun | None = None,
        identity: Mapping[str, object] | None = None,
        starts_from: Sequence[PriorRelease] = (),
    ) -> None:
        self.plan, self.folder, self.ranks = plan, Path(run_folder), ranks
        self.identity = {**(identity or {}), **mechanism_identity(plan)}
        self._starts_from = tuple(starts_from)
        self.ledger: Ledger | None = None
        self.step: PrivateStep | PlainStep | None = None
        self._noise: GaussianNoise | CorrelatedNoise | None = None
        self._sampler: PoissonSampler | None = None
        self._has_skipped = False  # the draws of completed steps
        self._parameters: list[nn.Parameter] = []
        self._mechanism = dict(resume_from.mechanism) if resume_from else {}
        self._planned_before = int(self._mechanism.get(_PLANNED, 0))
        self._completed_before, self.last = ranks.from_main(lambda: self._open(resume_from))

    @property
    def completed(self) -> int:
        """Steps that are part of the result."""
        return self._completed_before + (0 if self.step is None else self.step.finished)

    @property
    def epsilon(self) -> float | None:
        """Epsilon spent so far; None before the first step, without privacy and on all ranks but 0.

        None too if it is infinite, because no log or JSON file may hold such a number. It is computed on a coarse grid,
        which may exceed the target of a run that does not: then it is the target, which holds for all planned steps.
        """
        if self.ledger is None or self.plan.privacy is None or not self.ledger.steps:
            return None
        spent = self.ledger.running_epsilon(self.plan.privacy.delta)
        planned = self.plan.privacy.spend(self.plan.steps).steps
        if self.plan.target_epsilon is not None and self.ledger.turns <= planned:
            spent = min(spent, self.plan.target_epsilon)
        return spent if math.isfinite(spent) else None

    @property
    def clip_norm(self) -> float | None:
        """C of the current step; None without privacy."""
        return self.step.clip_norm if isinstance(self.step, PrivateStep) else None

    def sampler(self) -> PoissonSampler:
        """The sampler of the run, whose draws of items are the same on every rank. Every rank must call this."""
        return self._after_completed(self._poisson())

    def draws(self, authors: Authors | None) -> PoissonSampler | AuthorSampler:
        """The sampler of rows, or of authors with some of their rows; its draws are the same on every rank.

        Every rank must call this.

        Args:
            authors: who wrote which row; required if the plan samples authors.
        """
        unit = self.plan.unit
        if not isinstance(unit, PrivacyUnit) or not unit.samples_authors:
            return self.sampler()
        if authors is None:
            raise RuntimeError("the data were loaded without the column of the privacy unit")
        sampler = AuthorSampler(self._poisson(), authors.rows(), unit.examples, mean=unit.gradient == "mean")
        return self._after_completed(sampler)

    def prepare(
        self,
        model: nn.Module,
        *,
        gradient_sync: GradientSync = "gather",
        loss_scale: float = 1.0,
        keep_whole_sum: bool = False,
    ) -> None:
        """Make the step for `model`. The guarantee covers its trainable parameters.

        Args:
            model: must be the same on every rank.
            gradient_sync: how ranks add up their gradients, see `sum_over_ranks`.
            loss_scale: see `PrivateStep`.
            keep_whole_sum: see `PrivateStep`.

        Raises:
            InvalidArgument: see `PrivateStep`.
        """
        ranks, world_size = self.ranks, self.ranks.world_size
        gather = ranks.gather if gradient_sync == "gather" else None
        reduce = ranks.reduce if gradient_sync == "reduce" else None
        self._parameters = trainable_parameters(model)
        if self.plan.privacy is None:
            self.step = PlainStep(
                model,
                self.plan.expected_batch_size,
                gather=gather,
                reduce=reduce,
                world_size=world_size,
                loss_scale=loss_scale,
            )
            return
        size = released_size(model, self.plan.privacy, ranks.rank)
        noise = self._make_noise(size, local_part(self._parameters[0]).device)
        privacy = self.plan.privacy
        bands = ranks.from_main(lambda: privacy.bands)  # the sum over ranks has the bands that all of them share
        self.step = PrivateStep(
            model,
            self.plan.privacy,
            ledger=self.ledger,
            noise=noise,
            gather=gather,
            reduce=reduce,
            rank=ranks.rank,
            world_size=world_size,
            sampler=self._poisson(),
            loss_scale=loss_scale,
            keep_whole_sum=keep_whole_sum,
            bands=bands,
        )
        self._noise = self.step.noise
        if self._mechanism:
            self.step.load_state_dict(self._mechanism)

    def __enter__(self) -> PrivateRun:
        self._ready.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks from the model and end the noise's thread; does nothing the second time."""
        if self.step is not None:
            self.step.__exit__(None, None, None)
            self._completed_before, self.step = self.completed, None

    def begin_step(self) -> None:
        """Call this before the first forward pass of a step: it checks budget and ranks, and draws new dropout masks.

        Raises:
            RuntimeError: no step is left, or the ranks hold different parameters.
        """
        number = self.completed + 1
        if number > self.last:
            raise RuntimeError(f"step {number} is beyond the last step that the budget allows, {self.last}")
        if number % _RANKS_CHECKED_EVERY == 1 and not are_sharded(self._parameters):
            self.ranks.require_equal(self._parameters)
        new_randomness(self.ranks.rank, number, test_seed=self.plan.test_seed)

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1, items: Items | None = None) -> MicroBatchStats:
        """Run the backward pass of one micro-batch and add its clipped gradients; see `PrivateStep.backward`.

        Args:
            losses: one loss per row, [B]; each depends on that row alone.
            rows_per_unit: how many neighbouring rows are clipped as one.
            items: the drawn numbers of the rows, or units; required with privacy.
        """
        return self._ready.backward(losses, rows_per_unit=rows_per_unit, items=items)

    def add_nothing(self) -> None:
        """Take part in a micro-batch whose pass failed on this rank; see `PrivateStep.add_nothing`."""
        self._ready.add_nothing()

    def finish_step(self) -> None:
        """Write the private gradient of the current step to `.grad`.

        Raises:
            RuntimeError: the step is beyond the budget; nothing is released.
        """
        if self.completed >= self.last:
            raise RuntimeError(f"step {self.completed + 1} is beyond the last step that the budget allows, {self.last}")
        self._ready.finish()
        if self.plan.privacy is not None:
            forget_randomness()

    def gradient_noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the last step's gradient; 0 without privacy."""
        return self._ready.gradient_noise_std()

    def mechanism_state(self) -> dict[str, float]:
        """The mechanism's state that a checkpoint must keep; see `SavedRun.mechanism`."""
        state = self._ready.state_dict()
        return state if self.plan.privacy is None else state | {_PLANNED: max(self.plan.steps, self._planned_before)}

    def statement(
        self, packages: Iterable[str] = (), *, planned: bool = True, average: str | None = None
    ) -> PrivacyStatement:
        """What the run guarantees. Rank 0 only.

        Args:
            packages: further distributions whose versions are listed.
            planned: whether epsilon counts the steps that were planned, by this launch or an earlier one, and did not
                run. It must if what ended the run may depend on its steps. False is for a look at what the completed
                steps have cost so far.
            average: see `PrivacyStatement`.
        """
        unused = self._planned(self.last) - self.completed if planned else 0
        return replace(self._stated(packages, unused), starts_from=self._starts_from, average=average)

    def _stated(self, packages: Iterable[str], unused_steps: int) -> PrivacyStatement:
        unit, packages = self.plan.unit, ("cryptography", *packages)
        if self.plan.privacy is not None and self.ledger is not None and self._noise is not None:
            return state_privacy(
                self.plan.privacy,
                self.ledger,
                self._noise,
                repeated_steps=self.ledger.steps - self.completed,
                unused_steps=unused_steps,
                privacy_unit=unit.name,
                method=unit.how,
                sampled=unit.sampled,
                packages=packages,
            )
        return state_no_privacy(
            num_examples=self.plan.num_examples,
            expected_batch_size=self.plan.expected_batch_size,
            steps=self.completed,
            privacy_unit=unit.name,
            method=unit.how,
            sampled=unit.sampled,
            packages=packages,
            parts=self.plan.parts,
            max_batch=self.plan.max_batch,
        )

    @property
    def _ready(self) -> PrivateStep | PlainStep:
        if self.step is None:
            raise RuntimeError("the run is not open: call prepare(model), then use the run as a context manager")
        return self.step

    def _open(self, saved: SavedRun | None) -> tuple[int, int]:
        """Check the folder and the checkpoint, open the ledger, and return (completed steps, last step)."""
        if saved is None:
            refuse_existing_run(self.folder)
        else:
            refuse_other_run(saved.identity, self.identity)
        completed = 0 if saved is None else saved.step
        if self.plan.privacy is None:
            return completed, self.plan.steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.folder / LEDGER_NAME, group_size=self.plan.privacy.group_size)
        if saved is not None:
            self.ledger.require_continues(saved.ledger, saved.ledger_steps)
        last = last_step(self.plan, self.ledger.turns, completed)
        if self.plan.register is not None:
            spends = [*self.ledger.spends, *spends_to_come(self.plan, self._planned(last) - completed)]
            register = Budget.register(self.plan.register)
            register.reserve(self.ledger.path, spends, unit=self.plan.unit.name, resumes=saved is not None)
            begin_ledger(self.ledger.path)
        return completed, last

    def _planned(self, last: int) -> int:
        """The steps that count if this launch ends after `last`: those of an earlier launch, if that planned more. A
        launch that its budget ends has not chosen to."""
        return last if self._planned_before <= self.plan.steps else self._planned_before

    def _poisson(self) -> PoissonSampler:
        """The sampler of the run's units, made at the first call."""
        if self._sampler is None:
            plan = self.plan
            keystream = self._sampling_keystream()
            self._sampler = PoissonSampler(
                plan.num_examples,
                plan.sampling_probability,
                keystream,
                parts=plan.parts,
                max_batch=plan.max_batch,
                noise_bands=plan.privacy.noise_bands if plan.privacy is not None else 1,
            )
        return self._sampler

    def _after_completed(self, sampler: S) -> S:
        """Skip the draws of the completed steps if draws are repeatable; secret draws are always new."""
        if self.plan.test_seed is not None and not self._has_skipped:
            for _ in range(self.completed):
                sampler.draw()
            self._poisson()._forget()
        self._has_skipped = True
        return sampler

    def _sampling_keystream(self) -> Keystream:
        if self.plan.test_seed is not None:
            return Keystream.for_tests(f"{self.plan.test_seed} sampling")
        return Keystream.shared(self.ranks.from_main(new_key))

    def _make_noise(self, size: int, device: torch.device) -> GaussianNoise:
        if self.plan.test_seed is None:
            return GaussianNoise(size, device=device)
        keystream = Keystream.for_tests(f"{self.plan.test_seed} noise of rank {self.ranks.rank}")
        noise = GaussianNoise(size, keystream, device=device)
        for _ in range(self.completed):
            noise.take()
        return noise


def describe_end(run: PrivateRun, statement: PrivacyStatement) -> list[str]:
    """The guarantee of a run that has ended, as lines of text for the user."""
    lines = []
    if run.completed == run.last < run.plan.steps:
        steps = f"step {run.completed} of {run.plan.steps}"
        lines.append(f"stopped by budget      after {steps}: one more would exceed the target epsilon")
    if statement.epsilon is None:
        lines.append("privacy                NONE: " + "; ".join(statement.reasons))
    else:
        lines.append(f"privacy                epsilon {rounded_up(statement.epsilon)} at delta {statement.delta:g}")
    if statement.repeated_steps:
        lines.append(f"repeated steps         {statement.repeated_steps:,}, lost in a crash; epsilon counts them too")
    if statement.unused_steps:
        lines.append(
            f"unused steps           {statement.unused_steps:,}, left out early; epsilon counts them all the same"
        )
    return lines
