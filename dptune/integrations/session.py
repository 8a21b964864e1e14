"""One private training run on one process, whatever loop drives it: ledger, step, budget, checkpoints, report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn

from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.accounting import max_steps
from dptune.accounting.rounding import rounded_up
from dptune.dropout import draw_new_masks, forget_masks
from dptune.integrations.arguments import PrivacyArguments
from dptune.integrations.planning import ItemUnit, TrainingPlan
from dptune.integrations.processes import copy_from_main, from_main, sampling_keystream
from dptune.keystream import Keystream
from dptune.ledger import Ledger, has_begun
from dptune.lora import trainable_parameters
from dptune.noise import GaussianNoise
from dptune.ranks import require_equal
from dptune.report.statement import PrivacyStatement, state_no_privacy, state_privacy, write_privacy_report
from dptune.run.checkpoint import LEDGER_NAME
from dptune.run.identity import refuse_other_run
from dptune.sampling import PoissonSampler
from dptune.step import PlainStep, PrivateStep, released_size

REPORT_NAME = "privacy_report.json"
STATE_NAME = "privacy_state.json"

_RANKS_CHECKED_EVERY = 10  # steps
_PACKAGES = ("transformers", "accelerate", "cryptography")


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint says about the run's privacy."""

    step: int
    ledger_steps: int
    identity: dict[str, Any]


class TrainingSession:
    """Opens the run's ledger; refuses a folder that holds another run, or a checkpoint of one. Every process makes it.

    Args:
        plan: how the run samples and how long it lasts.
        privacy: the flags it was made from.
        output_dir: the run's folder.
        checkpoint: the one to go on from; its weights are the caller's to load.
        privacy_unit: whose presence is hidden, for the report.

    Attributes:
        completed: steps behind this run.
        last: the step after which it ends: the planned one, or an earlier one where steps that a crash threw away
            have used up the budget.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        privacy: PrivacyArguments,
        output_dir: str,
        *,
        checkpoint: str | Path | None,
        privacy_unit: str | ItemUnit,
    ) -> None:
        self.plan, self._privacy, self._folder = plan, privacy, Path(output_dir)
        self._unit = ItemUnit.of(privacy_unit)
        self._ledger: Ledger | None = None
        self.step: PrivateStep | PlainStep | None = None
        self._noise: GaussianNoise | None = None
        self._parameters: list[nn.Parameter] = []
        self.completed, self.last = from_main(lambda: self._open(checkpoint))

    @property
    def epsilon(self) -> float | None:
        """Spent so far, on the main process of a private run that has taken a step; None elsewhere."""
        if self._ledger is None or self.plan.privacy is None or not self._ledger.steps:
            return None
        return self._ledger.running_epsilon(self.plan.privacy.delta)

    def sampler(self) -> PoissonSampler:
        """Draws that are the same on every process; every process calls it."""
        keystream = sampling_keystream(self._privacy.insecure_test_seed)
        sampler = PoissonSampler(self.plan.num_examples, self.plan.sampling_probability, keystream)
        for _ in range(0 if keystream.secret else self.completed):
            sampler.draw()
        return sampler

    def begin(self, model: nn.Module) -> None:
        """Give every process the same weights and record per-example gradients from now on, until `close`.

        Only after the optimizer was made: while recording, no parameter asks for a gradient.
        """
        copy_from_main(model)
        state = PartialState()
        ranks: dict[str, Any] = {"gather": gather, "world_size": state.num_processes}
        self._parameters = trainable_parameters(model)
        if self.plan.privacy is None:
            self.step = PlainStep(model, self.plan.expected_batch_size, **ranks)
        else:
            rank = state.process_index
            self._noise = self._make_noise(released_size(model, self.plan.privacy), rank)
            self.step = PrivateStep(
                model, self.plan.privacy, ledger=self._ledger, noise=self._noise, rank=rank, **ranks
            )
        self.step.__enter__()

    def begin_step(self, global_step: int) -> None:
        """Before the first forward pass of step `global_step + 1`: dropout's masks are secret."""
        if self.plan.privacy is not None:
            rank = PartialState().process_index
            draw_new_masks(rank, global_step + 1, test_seed=self._privacy.insecure_test_seed)

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1) -> Tensor:
        """Add one micro-batch's clipped gradients, losses [B]; their sum, detached."""
        assert self.step is not None
        return self.step.backward(losses, rows_per_unit=rows_per_unit).losses.sum()

    def finish_step(self, global_step: int) -> None:
        """Write the private gradient of step `global_step + 1`; a step beyond the budget is never released."""
        assert self.step is not None
        if global_step >= self.last:
            raise RuntimeError(f"step {global_step + 1} is beyond the last one, {self.last}, that the budget allows")
        if PartialState().num_processes > 1 and global_step % _RANKS_CHECKED_EVERY == 0:
            require_equal(self._parameters, gather)
        self.step.finish()
        if self.plan.privacy is not None:
            forget_masks()

    def save(self, checkpoint: str | Path, completed: int) -> None:
        """Add to a checkpoint what says which run it is of, and a copy of the ledger. Main process only."""
        folder, steps = Path(checkpoint), 0
        if self._ledger is not None:
            steps = self._ledger.steps
            with atomic_write(folder / LEDGER_NAME, "wb") as file:
                file.write(self._ledger.content())
        state = {"step": completed, "ledger_steps": steps, "identity": self._identity()}
        with atomic_write(folder / STATE_NAME) as file:
            file.write(json.dumps(state, indent=2) + "\n")

    def describe_end(self, completed: int) -> list[str]:
        """Write `privacy_report.json` and say in lines for a person what was guaranteed. Main process only."""
        statement = self.statement(completed)
        write_privacy_report(self._folder / REPORT_NAME, statement)
        lines = []
        if completed == self.last < self.plan.steps:
            steps = f"step {completed} of {self.plan.steps}"
            lines.append(f"stopped by budget      after {steps}: one more would exceed --target_epsilon")
        if statement.epsilon is None:
            return [*lines, "privacy                NONE: " + "; ".join(statement.reasons)]
        return [*lines, f"privacy                epsilon {rounded_up(statement.epsilon)} at delta {statement.delta:g}"]

    def statement(self, completed: int) -> PrivacyStatement:
        """What a run of so many steps guarantees. Main process only."""
        unit = {"privacy_unit": self._unit.name, "sampled": self._unit.sampled, "method": self._unit.method}
        if self.plan.privacy is not None and self._ledger is not None and self._noise is not None:
            repeated = self._ledger.steps - completed
            return state_privacy(
                self.plan.privacy,
                self._ledger,
                self._noise,
                repeated_steps=repeated,
                packages=_PACKAGES,
                **unit,
            )
        return state_no_privacy(
            num_examples=self.plan.num_examples,
            expected_batch_size=self.plan.expected_batch_size,
            steps=completed,
            packages=_PACKAGES,
            **unit,
        )

    def close(self) -> None:
        """Take the hooks off the model and end the noise's thread; does nothing the second time."""
        if self.step is not None:
            self.step.__exit__(None, None, None)
            self.step = None

    def _open(self, checkpoint: str | Path | None) -> tuple[int, int]:
        """(completed steps, last step) after every check; opens the ledger."""
        if checkpoint is None:
            self._refuse_existing_run()
            saved = _Saved(0, 0, self._identity())
        else:
            saved = _read_state(Path(checkpoint))
            refuse_other_run(saved.identity, self._identity())
        if self.plan.privacy is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._ledger = Ledger(self._folder / LEDGER_NAME)
            if checkpoint is not None:
                self._ledger.require_continues(Path(checkpoint) / LEDGER_NAME, saved.ledger_steps)
        return saved.step, self._last_step(saved.step)

    def _last_step(self, completed: int) -> int:
        target, config = self._privacy.target_epsilon, self.plan.privacy
        if self._ledger is None or config is None or target is None or self._ledger.steps <= completed:
            return self.plan.steps
        affordable = max_steps(
            target_epsilon=target,
            delta=config.delta,
            noise_multiplier=config.noise_multiplier,
            sampling_probability=config.sampling_probability,
            at_least=self.plan.steps,
        )
        return min(self.plan.steps, max(completed, completed + affordable - self._ledger.steps))

    def _refuse_existing_run(self) -> None:
        begun = {LEDGER_NAME: has_begun(self._folder / LEDGER_NAME), REPORT_NAME: (self._folder / REPORT_NAME).exists()}
        for name, is_there in begun.items():
            if is_there:
                remedy = f"holds a run already ({name}); give another folder, or resume_from_checkpoint"
                refuse("--output_dir", str(self._folder), remedy)

    def _make_noise(self, size: int, rank: int) -> GaussianNoise:
        seed = self._privacy.insecure_test_seed
        if seed is None:
            return GaussianNoise(size)
        noise = GaussianNoise(size, Keystream.for_tests(f"{seed} noise of rank {rank}"))
        for _ in range(self.completed):
            noise.take()
        return noise

    def _identity(self) -> dict[str, Any]:
        """What decides the mechanism, as JSON values: a resumed run must share it."""
        config = self.plan.privacy
        return {
            "clip_norm": config.clip_norm if config else None,
            "noise_multiplier": config.noise_multiplier if config else None,
            "delta": config.delta if config else None,
            "target_epsilon": self._privacy.target_epsilon if config else None,
            "expected_batch_size": self.plan.expected_batch_size,
            "sampling_probability": self.plan.sampling_probability,
            "num_examples": self.plan.num_examples,
            "privacy_unit": self._unit.name,
            "method": self._unit.method,
            "insecure_test_seed": self._privacy.insecure_test_seed,
        }


def _read_state(checkpoint: Path) -> _Saved:
    try:
        return _Saved(**json.loads((checkpoint / STATE_NAME).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        remedy = f"holds no readable {STATE_NAME} ({type(error).__name__}); give an older checkpoint of a private run"
        refuse("--resume_from_checkpoint", str(checkpoint), remedy)
