"""What is told of a language model that is fine-tuned."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.tasks import rows
from utils.training.causal_lm import task as task_module
from utils.training.causal_lm.load import load_causal_lm
from utils.training.causal_lm.task import CausalLMTask


def test_the_held_out_loss_is_measured_where_there_are_data(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_module, "held_out_loss", lambda _, data, __: float(len(data)))
    task = load_causal_lm(job())
    assert isinstance(task, CausalLMTask)
    nothing: Any = None
    assert task.evaluate(nothing) == {}
    task.job = dataclasses.replace(task.job, held_out=rows())
    assert task.evaluate(nothing) == {"eval_loss": 10.0}
