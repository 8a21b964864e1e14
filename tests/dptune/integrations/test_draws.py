"""Draws for a Trainer: its loader gives one new, complete Poisson draw per step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

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
        own = DrawSampler(sampler, steps_per_epoch=5, steps_left=lambda: 4, rank=rank, world_size=2)
        return [[int(item) for item in step["items"]] for step in own]

    reference = PoissonSampler(COUNT, 0.5, Keystream.for_tests("2 sampling"))
    both = [sorted(one + other) for one, other in zip(shares(0), shares(1), strict=True)]
    assert both == [sorted(reference.draw().tolist()) for _ in range(4)]


def test_rows_of_other_examples_are_refused() -> None:
    sampler = DrawSampler(PoissonSampler(COUNT, 0.5), steps_per_epoch=1, steps_left=lambda: 1)
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


def test_without_privacy_an_empty_micro_batch_holds_the_first_item_as_no_item_of_a_draw() -> None:
    made = LeastBatches(lambda items: {"items": list(items)}, most_rows=4).empty(3, "abc")
    assert (made.inputs, made.items.tolist(), made.units, made.rows_per_unit) == ({"items": ["a"]}, [], 1, 3)


class Crops(Dataset[Any]):
    """Reads random numbers of every generator, as augmentations do."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.random()]


def first_of(loader: Any) -> list[float]:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    return next(iter(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_nobody_can_predict_the_random_numbers_of_a_data_set(workers: int) -> None:
    """transformers seeds all generators with `args.seed`, which is public."""

    def read() -> list[float]:
        sampler = DrawSampler(PoissonSampler(COUNT, 1.0), steps_per_epoch=1, steps_left=lambda: 1)
        cut = LeastBatches(lambda items: {"items": torch.tensor(items)}, 1)
        draw = first_of(draw_loader(Crops(), cut, sampler, rows_per_unit=np.ones(COUNT, int), num_workers=workers))
        return draw["micro_batches"][0].inputs["items"][0].tolist()

    assert all(one != other for one, other in zip(read(), read(), strict=True))


def test_nobody_can_predict_the_random_numbers_of_a_data_set_behind_the_trainers_loader() -> None:
    def read() -> list[float]:
        examples = PoissonMicroBatches(Crops(), parts=2, micro_batch_size=1, steps_per_epoch=1)
        examples.start(PoissonSampler(COUNT, 1.0))
        return first_of(DataLoader(examples, batch_size=1, collate_fn=list))[0]

    assert all(one != other for one, other in zip(read(), read(), strict=True))


def test_a_pass_that_ended_early_leaves_no_draw_behind() -> None:
    """Workers prefetch draws, and the next step would be compared with those."""
    sampler = PoissonSampler(COUNT, 0.5, Keystream.for_tests("3 sampling"))
    left, passes = 5, []
    own = DrawSampler(sampler, steps_per_epoch=4, steps_left=lambda: left)
    for step in own:
        passes.append(step["items"])
        if len(passes) == 3:
            break
    assert len(sampler._unused) == 3
    left = 2
    assert len(list(own)) == 2, "steps that a pass did not take are still to be taken"
    assert len(sampler._unused) == 2
