"""Learning rates are those of transformers' schedules to the bit, without what transformers imports for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dptune import InvalidArgument
from utils.training.schedules import LR_SCHEDULERS, make_schedule

ROOT = Path(__file__).parents[3]


def optimizer() -> torch.optim.Optimizer:
    """With a group of another rate, as a classification head has it."""
    one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": [one]}, {"params": [other], "lr": 0.5}], lr=0.01)


def rates(schedule: Any, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr())
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 9), (3, 9), (8, 9), (12, 9), (0, 1)])
def test_rates_are_those_of_transformers(name: str, warmup: int, steps: int) -> None:
    from transformers import get_scheduler

    expected = get_scheduler(name, optimizer(), warmup, num_training_steps=steps)
    found = make_schedule(name, optimizer(), warmup=warmup, steps=steps)
    assert rates(found, steps) == rates(expected, steps)


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_a_schedule_that_transformers_saved_goes_on(name: str) -> None:
    from transformers import get_scheduler

    expected = get_scheduler(name, optimizer(), 2, num_training_steps=9)
    rates(expected, 4)
    found = make_schedule(name, optimizer(), warmup=2, steps=9)
    found.load_state_dict(expected.state_dict())
    assert rates(found, 4) == rates(expected, 4)


@pytest.mark.parametrize(
    ("name", "rate", "refusal"),
    [
        ("inverse_sqrt", 0.1, "lr_scheduler_type='inverse_sqrt': give one of"),
        ("polynomial", 1e-7, "learning_rate=1e-07"),
    ],
)
def test_what_has_no_schedule_is_refused(name: str, rate: float, refusal: str) -> None:
    with pytest.raises(InvalidArgument, match=refusal):
        make_schedule(name, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate), warmup=0, steps=9)


def test_the_training_loop_imports_no_library_that_it_does_not_use() -> None:
    code = (
        "import sys, utils.training.loop, utils.training.run, utils.training.causal_lm; "
        "print([name for name in ('peft', 'bitsandbytes', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
