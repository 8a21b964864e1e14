"""Draws for a Trainer: its loader gives one new, complete Poisson draw per step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dptune import InvalidArgument, Keystream, PoissonSampler
from dptune.integrations.draws import DrawSampler, LeastBatches, PoissonMicroBatches, draw_loader
from tests.dptune.integrations.runs import COUNT


def test_the_micro_batches_of_a_step_are_one_fresh_draw_whatever_the_sampler_asks_for() -> None:
    examples = PoissonMicroBatches(list(range(COUNT)), parts=3, micro_batch_size=2, steps_per_epoch=2)
    examples.start(PoissonSampler(COUNT, 0.5, Keystream.for_tests("1 sampling")))
    loader = DataLoader(examples, batch_size=2, shuffle=True, collate_fn=list)
    parts = [batch for _ in range(5) for batch in loader]
    reference = PoissonSampler(COUNT, 0.5, Keystream.for_tests("1 sampling"))
    for step in range(10):
        draw = reference.draw()
        assert [len(part) for part in parts[3 * step : 3 * step + 3]] == [len(p) for p in np.array_split(draw, 3)]
        assert [row for part in parts[3 * step : 3 * step + 3] for row in part] == draw.tolist()


def test_the_shares_of_all_processes_are_the_draw() -> None:
    def shares(rank: int) -> list[list[int]]:
        sampler = PoissonSampler(COUNT, 0.5, Keystream.for_tests("2 sampling"))
        own = DrawSampler(sampler, steps_per_epoch=5, steps_left=4, rank=rank, world_size=2)
        return [[int(item) for item in step["items"]] for step in own]

    reference = PoissonSampler(COUNT, 0.5, Keystream.for_tests("2 sampling"))
    both = [sorted(one + other) for one, other in zip(shares(0), shares(1), strict=True)]
    assert both == [sorted(reference.draw().tolist()) for _ in range(4)]


def test_rows_of_other_examples_are_refused() -> None:
    sampler = DrawSampler(PoissonSampler(COUNT, 0.5), steps_per_epoch=1, steps_left=1)
    with pytest.raises(InvalidArgument, match=r"^rows_per_unit=3: give one for each of the 12 examples"):
        draw_loader(list(range(COUNT)), LeastBatches(dict, 2), sampler, rows_per_unit=np.ones(3, dtype=np.int64))


def test_without_privacy_items_with_as_many_rows_share_the_least_micro_batches() -> None:
    def collate(items: Any) -> Any:
        return {"items": list(items)}

    made = LeastBatches(collate, most_rows=4)("abcdef", np.array([1, 4, 1, 1, 9, 1]))
    assert [(batch.inputs["items"], batch.units, batch.rows_per_unit) for batch in made] == [
        (["e"], 1, 9),
        (["b"], 1, 4),
        (["a", "c", "d", "f"], 4, 1),
    ]
    assert [batch.items.tolist() for batch in made] == [[4], [1], [0, 2, 3, 5]]
