"""The fixed time of a pass follows from what is trained and where, and decides the rows of a micro-batch."""

from __future__ import annotations

import pytest
from torch import nn

from dptune.pass_overhead import pass_overhead
from dptune.shapes import Shapes

_KINDS = [(False, False), (True, False), (True, True)]  # an accelerator, sharded


@pytest.fixture
def model() -> nn.Module:
    """A whole model that is trained."""
    return nn.Linear(8, 8)


def test_a_pass_with_gathers_costs_most_and_a_cpu_least(model: nn.Module) -> None:
    alone, fast = pass_overhead(model, accelerator=False), pass_overhead(model, accelerator=True)
    assert 0 < alone < fast < pass_overhead(model, accelerator=True, sharded=True)
    assert pass_overhead(model, accelerator=False, sharded=True) > alone


def test_micro_batches_have_more_rows_and_fewer_widths_where_a_pass_costs_more(model: nn.Module) -> None:
    overheads = [pass_overhead(model, accelerator=fast, sharded=shards) for fast, shards in _KINDS]
    shapes = [Shapes(512, 16384, 200, overhead=overhead) for overhead in overheads]
    rows = [one.shape(512).items for one in shapes]
    widths = [len(one.widths) for one in shapes]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
