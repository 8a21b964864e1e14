"""What the training loops share: the step of a plan on these ranks, and what was measured in it."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from dptune import Ledger, PlainStep, PrivateStep
from dptune.step import MicroBatchStats, released_size
from utils.micro_batches import MicroBatches
from utils.randomness import make_noise
from utils.run_log import summarise
from utils.run_plan import RunPlan
from utils.unit_batches import Draw, rows_of


def make_step(
    model: nn.Module,
    plan: RunPlan,
    ledger: Ledger | None,
    accelerator: Accelerator,
    *,
    gradient_sync: str = "gather",
    loss_scale: float = 1.0,
    test_seed: int | None,
    completed: int,
) -> PrivateStep | PlainStep:
    """The step of a run, private if its plan is.

    Args:
        model, plan: what is trained, and how.
        ledger: of a private run, on the main process.
        accelerator: the ranks.
        gradient_sync: gather or reduce.
        loss_scale: see `PrivateStep`.
        test_seed, completed: see `utils.randomness.make_noise`.
    """
    how = {"gather": accelerator.gather, "reduce": accelerator.reduce}
    ranks: dict[str, Any] = {gradient_sync: how[gradient_sync]}
    ranks |= {"world_size": accelerator.num_processes, "loss_scale": loss_scale}
    if plan.privacy is None:
        return PlainStep(model, plan.expected_batch_size, **ranks)
    rank = accelerator.process_index
    noise = make_noise(released_size(model, plan.privacy), rank, test_seed=test_seed, completed=completed)
    return PrivateStep(model, plan.privacy, ledger=ledger, noise=noise, rank=rank, **ranks)


def measured(micro_batches: MicroBatches, plan: RunPlan, draw: Draw, seen: list[MicroBatchStats]) -> dict[str, Any]:
    """`StepMetrics` fields of what all ranks saw in one step. NOT private."""
    gathered = micro_batches.gathered
    clip_norm = plan.privacy.clip_norm if plan.privacy else None
    summary = summarise(
        gathered([stats.losses for stats in seen]), gathered([stats.norms for stats in seen]), clip_norm
    )
    return summary | {"batch_drawn": len(draw), "tokens": int(micro_batches.data.lengths[rows_of(draw)].sum())}


def running_epsilon(plan: RunPlan, ledger: Ledger | None) -> float | None:
    """Epsilon of the ledger so far; None without privacy, or where the ledger is another rank's."""
    return ledger.running_epsilon(plan.privacy.delta) if ledger and plan.privacy else None
