"""The operations and waits that privacy adds to a step: limits at what was measured, to be lowered with the code."""

from __future__ import annotations

import pytest

from tests.pretend.operations import LAYERS, TRAINED, Compared, compare, of_sharded, table

# By what is trained, for torch 2.13 and transformers 5.23: operations of a private micro-batch as a multiple of the
# plain step's, rounded up to hundredths, and waits that the plain step does not have.
MICRO_BATCH = {"LoRA on q, k, v, o": (1.00, 0), "all weights": (1.52, 1)}
# Operations and waits of the private step's end, once per logical step.
END = {"LoRA on q, k, v, o": (112, 2), "all weights": (13, 2)}


@pytest.fixture(scope="module", params=TRAINED)
def found(request: pytest.FixtureRequest) -> tuple[str, Compared, Compared]:
    """(what is trained, a micro-batch, the end of the step)."""
    return request.param, *compare(request.param)


def test_a_private_micro_batch_runs_few_more_operations(found: tuple[str, Compared, Compared]) -> None:
    name, micro_batch, _ = found
    assert micro_batch.plain.operations > 500
    assert micro_batch.ratio <= MICRO_BATCH[name][0], micro_batch.private.by_operation


def test_a_private_micro_batch_waits_seldom(found: tuple[str, Compared, Compared]) -> None:
    name, micro_batch, _ = found
    assert micro_batch.more_waits <= MICRO_BATCH[name][1], micro_batch.private.by_wait


def test_the_end_of_a_step_is_short(found: tuple[str, Compared, Compared]) -> None:
    name, _, end = found
    assert end.plain.waits == 0
    assert end.private.operations <= END[name][0], end.private.by_operation
    assert end.private.waits <= END[name][1], end.private.by_wait


# A layer's weights are gathered twice, and the others once. Each gather copies every weight into and out of a buffer.
GATHERS, COPIES = 2 * LAYERS + 1, 2 * (2 * 9 * LAYERS + 3)
# Other operations that sharding adds to a micro-batch: making and sending the sums of neighbouring small parameters.
SUMS = {"LoRA on q, k, v, o": 0, "all weights": 5}


def test_a_sharded_micro_batch_waits_no_more_often_and_adds_little_but_its_gathers(
    found: tuple[str, Compared, Compared],
) -> None:
    name, whole, _ = found
    sharded, _ = of_sharded(name)
    assert sharded.waits == whole.private.waits, sharded.by_wait
    more = sharded.by_operation - whole.private.by_operation
    assert more["all_gather"] == GATHERS
    assert more.total() <= GATHERS + COPIES + SUMS[name], more


def test_the_end_of_a_sharded_step_waits_for_the_word_of_rank_0_alone(found: tuple[str, Compared, Compared]) -> None:
    name, _, end = found
    _, sharded = of_sharded(name)
    assert sharded.waits - end.private.waits == (1 if name == "all weights" else 0), sharded.by_wait


def test_the_table_names_each_count_and_the_places_that_wait() -> None:
    lines = table(details=True)
    assert sum(line.startswith(("| LoRA on q, k, v, o |", "| all weights |")) for line in lines) == 8
    assert any("dptune/" in line for line in lines)
    assert len(table()) == 15
