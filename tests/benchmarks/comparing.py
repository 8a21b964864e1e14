"""What the benchmarks' tests compare: the updates that contenders make, and the rows of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from benchmarks import contenders, lengths, peers, settings
from benchmarks.contenders import Job

T = TypeVar("T")


def rows_of(markdown: str) -> dict[str, list[str]]:
    """{first cell: the others} of all tables."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    heads = ("contender", "peak memory", "---")
    return {cells[0]: cells[1:] for cells in lines if cells[0] not in heads and not cells[0].endswith(", beside")}


def in_this_process(function: Callable[..., T], *args: object) -> T:
    """What a new process would do, here, so that a test can change what it finds."""
    return function(*args)


def trained(contender: contenders.Contender) -> list[torch.nn.Parameter]:
    """The adapters or, if there are none, the whole model."""
    named = dict(contender._model.named_parameters())
    return [parameter for name, parameter in named.items() if "lora" in name] or list(named.values())


def updates(
    names: list[str], job: Job, draw: lengths.Draw, monkeypatch: pytest.MonkeyPatch, *, clip_norm: float = 1.0
) -> list[torch.Tensor]:
    """What one step of each changes, from the same weights, by plain descent at rate 1 and with hardly any noise."""
    for module in (contenders, peers):
        monkeypatch.setattr(module, "adamw", lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        monkeypatch.setattr(module, "NOISE_MULTIPLIER", 1e-12)
        monkeypatch.setattr(module, "CLIP_NORM", clip_norm)
    found = []
    for name in names:
        contender = settings.make(name, job)
        parameters = trained(contender)
        if job.rank is not None:
            _randomise(parameters)  # an adapter's second matrix begins at zero
        before = [parameter.detach().clone() for parameter in parameters]
        contender.step(draw)
        contender.close()
        found.append(torch.cat([(old - new).flatten() for old, new in zip(before, parameters, strict=True)]).detach())
    return found


def assert_same(update: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within a thousandth."""
    assert expected.norm() > 1e-3
    assert (update - expected).norm() < 1e-3 * expected.norm()


@torch.no_grad()
def _randomise(parameters: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
