"""What a resumed run is compared with, how many processes and steps it counts, and what is restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from dptune import InvalidArgument, Ledger, add_lora, trainable_parameters
from dptune.budget import Budget
from dptune.run.checkpoint import TrainingState
from dptune.run.plan import RunPlan
from dptune.run.session import PrivateRun
from tests.examples import randomise_adapters
from tests.tiny import tiny_llama
from utils.training.optimization_arguments import OptimizationArguments
from utils.training.output_arguments import OutputArguments
from utils.training.plan import plan_run
from utils.training.privacy_flags import PrivacyFlags
from utils.training.resume import (
    Checkpoints,
    find_saved_run,
    processes_of_plan,
    refuse_other_beginning,
    restore,
    saved_run,
)

NUM_EXAMPLES = 100


def adapted(model: Any = None, **how: Any) -> Any:
    model = model or tiny_llama()
    settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")}
    add_lora(model, **settings | how)
    return model


def test_what_is_known_before_the_model_is_compared_before_it_is_loaded() -> None:
    saved = saved_state(64, 1, identity={"a": 1, "base_model": "x"})
    refuse_other_beginning(saved, {"a": 1})
    with pytest.raises(InvalidArgument, match="a was 1 in the checkpoint and is 2 now"):
        refuse_other_beginning(saved, {"a": 2})


# --- processes and steps ---


def saved_state(expected_batch_size: int, num_processes: int, **changed: Any) -> TrainingState:
    values: dict[str, Any] = {
        "step": 4,
        "ledger_steps": 0,
        "identity": {"expected_batch_size": expected_batch_size},
        "config": {"num_processes": num_processes},
        "weights": {},
        "optimizer": {},
        "schedule": {},
    }
    return TrainingState(**values | changed)


@pytest.mark.parametrize(
    ("began_with", "per_device", "accumulation", "now", "counts"),
    [
        (4, 2, 8, 4, 4),  # nothing changed
        (4, 2, 8, 2, 4),  # fewer processes: the batch stays that of four
        (4, 2, 8, 8, 4),
        (4, 2, 16, 2, 2),  # the flags make up for it
        (4, 4, 8, 2, 2),
        (4, 2, 4, 8, 8),
        (1, 2, 32, 1, 1),
        (4, 2, 9, 2, 4),  # another batch altogether: the identity refuses it
    ],
)
def test_a_resumed_run_counts_the_processes_that_keep_its_batch(
    began_with: int, per_device: int, accumulation: int, now: int, counts: int
) -> None:
    saved = saved_state(64, began_with)
    flags = OptimizationArguments(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    assert processes_of_plan(saved, flags, now) == counts
    if (per_device, accumulation) != (2, 9):
        assert per_device * accumulation * counts == 64


def test_a_new_run_counts_its_processes() -> None:
    assert processes_of_plan(None, OptimizationArguments(), 3) == 3


@pytest.fixture(scope="module")
def budget() -> RunPlan:
    """A run of 8 steps that spends its whole budget."""
    privacy = PrivacyFlags(clip_norm=1.0, target_epsilon=3.0, delta=1e-4, noise_bands="1")
    optimization = OptimizationArguments(per_device_train_batch_size=10, max_train_steps=8)
    return plan_run(privacy, optimization, num_examples=NUM_EXAMPLES, world_size=1)


def ledger_of(plan: RunPlan, steps: int, path: Path) -> Ledger:
    assert plan.privacy is not None
    ledger = Ledger(path)
    for _ in range(steps):
        ledger.record(
            noise_multiplier=plan.privacy.noise_multiplier,
            sampling_probability=plan.privacy.sampling_probability,
            clip_norm=1.0,
        )
    return ledger


# --- saving and restoring ---


def checkpoints(run: PrivateRun, *, every: int = 3) -> Checkpoints:
    return Checkpoints(run, {"num_processes": 1}, every, None)


def plain_run(folder: Path) -> PrivateRun:
    return PrivateRun(RunPlan(None, NUM_EXAMPLES, 10, 8), folder, identity={"a": 1})


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6, 8]), (10, [8])])
def test_checkpoints_are_due_every_few_steps_and_after_the_last(every: int, due: list[int], tmp_path: Path) -> None:
    run, found = plain_run(tmp_path), []
    for run._completed_before in range(1, 9):
        found += [run.completed] if checkpoints(run, every=every).due else []
    assert found == due


def in_training() -> tuple[nn.Module, Any, Any]:
    model = adapted()
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.01, weight_decay=0.1)
    return model, optimizer, get_scheduler("cosine", optimizer, 2, num_training_steps=9)


def save(run: PrivateRun, model: nn.Module, optimizer: Any, schedule: Any, *, completed: int) -> None:
    """Write a checkpoint after `completed` steps."""
    run._completed_before = completed
    run.prepare(model)
    with run:
        checkpoints(run).save(model, optimizer, schedule)


def find(folder: Path, resume: str | None = "latest") -> TrainingState | None:
    return find_saved_run(OutputArguments(str(folder), resume_from_checkpoint=resume))


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        for number, parameter in enumerate(trainable_parameters(model)):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        schedule.step()


def test_a_restored_run_continues_to_the_bit_as_if_never_stopped(tmp_path: Path) -> None:
    one = in_training()
    train(*one, range(4))
    save(plain_run(tmp_path), *one, completed=4)
    other = in_training()
    randomise_adapters(other[0], seed=5)
    saved = find(tmp_path)
    assert saved is not None
    before = copy.deepcopy(saved.weights)
    assert saved.step == 4
    restore(saved, *other)
    assert other[2].get_last_lr() == one[2].get_last_lr()
    for mine, theirs in zip(trainable_parameters(one[0]), trainable_parameters(other[0]), strict=True):
        assert torch.equal(mine, theirs)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(one[1].state[mine][key], other[1].state[theirs][key])
    for both in (one, other):
        train(*both, range(4, 8))
    for mine, theirs in zip(trainable_parameters(one[0]), trainable_parameters(other[0]), strict=True):
        assert torch.equal(mine, theirs)
    assert one[2].get_last_lr() == other[2].get_last_lr()
    assert all(torch.equal(before[name], saved.weights[name]) for name in before)  # the state is no alias


def rates(schedule: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("name", "warmup", "total"), [("constant", 0, 9), ("linear", 6, 9), ("cosine", 2, 12)])
def test_a_restored_run_has_the_rates_that_are_asked_for_now(
    name: str, warmup: int, total: int, tmp_path: Path
) -> None:
    one = in_training()
    train(*one, range(4))
    save(plain_run(tmp_path), *one, completed=4)
    asked, model = [], adapted()
    for _ in range(2):
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.5, weight_decay=0.3, betas=(0.8, 0.9))
        asked.append(get_scheduler(name, optimizer, warmup, num_training_steps=total))
    fresh, schedule = asked
    restore(find(tmp_path), model, schedule.optimizer, schedule)
    group = schedule.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (0.3, (0.8, 0.9), 0.5)
    assert schedule.get_last_lr() == [group["lr"]]
    for state in schedule.optimizer.state.values():
        assert state["exp_avg"].any()
    assert rates(schedule, 5) == rates(fresh, 9)[4:]


def test_without_a_checkpoint_a_run_starts(tmp_path: Path) -> None:
    model, *rest = in_training()
    start = [parameter.clone() for parameter in trainable_parameters(model)]
    restore(None, model, *rest)
    assert all(torch.equal(*pair) for pair in zip(start, trainable_parameters(model), strict=True))
    for asked in (None, "latest"):
        assert find(tmp_path, asked) is None


def private_run(folder: Path, plan: RunPlan) -> Ledger:
    """A folder with a checkpoint after 4 steps and a ledger of 6."""
    run = PrivateRun(plan, folder, identity={"a": 1})
    run.ledger = ledger_of(plan, 4, folder / "ledger.jsonl")
    save(run, *in_training(), completed=4)
    return ledger_of(plan, 2, folder / "ledger.jsonl")


def test_a_private_run_is_found_with_the_steps_its_checkpoint_knew(budget: RunPlan, tmp_path: Path) -> None:
    assert private_run(tmp_path, budget).steps == 6
    for asked in ("latest", str(tmp_path / "checkpoint-4")):
        saved = find(tmp_path, asked)
        assert saved is not None
        assert (saved.step, saved.ledger_steps) == (4, 4)
        assert (saved.identity["a"], saved.config) == (1, {"num_processes": 1})
        resumed = PrivateRun(budget, tmp_path, resume_from=saved_run(saved, tmp_path), identity={"a": 1})
        assert (resumed.completed, resumed.last) == (4, 6)


def test_a_ledger_that_lost_lines_is_refused(budget: RunPlan, tmp_path: Path) -> None:
    private_run(tmp_path, budget)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(InvalidArgument, match="has 3 lines, but the checkpoint already has 4"):
        find(tmp_path)
    path.unlink()
    with pytest.raises(InvalidArgument, match="has 0 lines, but the checkpoint already has 4"):
        find(tmp_path)


def test_a_ledger_without_a_checkpoint_is_refused(budget: RunPlan, tmp_path: Path) -> None:
    ledger_of(budget, 1, tmp_path / "ledger.jsonl")
    with pytest.raises(InvalidArgument, match=r"^--resume_from_checkpoint='latest': .*new --output_dir"):
        find(tmp_path)


def test_a_run_does_not_start_over_another(budget: RunPlan, tmp_path: Path) -> None:
    private_run(tmp_path, budget)
    with pytest.raises(InvalidArgument, match=r"^run_folder=.*holds a run already \(ledger.jsonl\)"):
        find(tmp_path, None)


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_run_starts_with_an_empty_ledger_that_a_budget_lists(resume: str | None, tmp_path: Path) -> None:
    Budget(tmp_path / "budget.jsonl").enter_training("run", tmp_path / "ledger.jsonl", unit="one example")
    assert find(tmp_path, resume) is None


def test_an_adapter_of_missing_layers_is_a_bug_of_the_program() -> None:
    state = saved_state(1, 1, weights={"model.layers.9.lora.A.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"model\.layers\.9"):
        restore(state, *in_training())
