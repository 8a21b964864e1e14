"""The fixed time of a pass follows from where it computes, and decides the rows of a micro-batch."""

from __future__ import annotations

from dptune.pass_overhead import pass_overhead
from dptune.shapes import Shapes


def test_a_pass_with_gathers_costs_more_and_an_accelerators_too() -> None:
    alone, fast = pass_overhead(accelerator=False), pass_overhead(accelerator=True)
    assert 0 < alone < pass_overhead(accelerator=False, sharded=True) < pass_overhead(accelerator=True, sharded=True)
    assert alone < fast < pass_overhead(accelerator=True, sharded=True)
    assert Shapes(512, 1024).overhead == alone


def test_micro_batches_have_more_rows_and_fewer_widths_where_a_pass_costs_more() -> None:
    kinds = [(False, False), (True, False), (True, True)]
    shapes = [Shapes(512, 16384, 200, overhead=pass_overhead(accelerator=a, sharded=s)) for a, s in kinds]
    rows, widths = [one.shape(512).items for one in shapes], [len(one.widths) for one in shapes]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
