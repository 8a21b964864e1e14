"""The held-out loss is the mean over tokens, however rows are cut and whatever they hold."""

from __future__ import annotations

import pytest
import torch

from dptune import CausalLMLoss
from dptune.shapes import Shapes
from tests.dptune.integrations.runs import lora_llama
from tests.examples import random_examples
from tests.reference import example_loss, oracle
from tests.tasks import TinyTask, rows
from utils.cli.launch import make_accelerator
from utils.training.evaluation import held_out_loss
from utils.training.micro_batches import MicroBatches


@pytest.mark.parametrize("budget", [30, 1000])
def test_it_is_the_mean_over_tokens(budget: int) -> None:
    model, data = lora_llama(), rows()
    data.is_answer[data.starts[3] : data.starts[4]] = False  # a row without an answer does not count
    examples = [example for row, example in enumerate(random_examples(len(data))) if row != 3]
    counts = [sum(label != -100 for label in labels) for _, labels in examples]
    total = sum(
        count * example_loss(oracle(model), example).item() for count, example in zip(counts, examples, strict=True)
    )
    found = held_out_loss(
        CausalLMLoss(model), data, MicroBatches(TinyTask().rows, Shapes(64, budget), 0, make_accelerator())
    )
    assert found == pytest.approx(total / sum(counts), rel=1e-5)


def test_no_gradient_is_taken() -> None:
    asked: list[bool] = []

    def losses(input_ids: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        asked.append(torch.is_grad_enabled())
        return torch.ones(len(input_ids))

    assert held_out_loss(losses, rows(), MicroBatches(rows(), Shapes(64, 60), 0, make_accelerator())) == 1.0
    assert not any(asked)
