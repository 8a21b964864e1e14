"""What a step was fed is its sampler's draw, whichever micro-batches and ranks it came in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dptune import Keystream, PoissonSampler
from dptune.fed_items import FedItems
from dptune.keystream import FIXED, SECRET
from dptune.sampling import FIXED_KEY, NOT_SHOWN, SAMPLER
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def a_sampler() -> PoissonSampler:
    return PoissonSampler(40, 0.25, Keystream.for_tests(1))


def feed(fed: FedItems, *micro_batches: Any) -> None:
    """Name and add micro-batches without rows that fill up."""
    for items in micro_batches:
        fed.add(fed.named(items, len(items)))


def test_parts_in_any_order_are_the_draw_and_the_next_step_begins_anew() -> None:
    sampler = a_sampler()
    fed = FedItems(sampler)
    for _ in range(2):
        first, second = np.array_split(sampler.draw(), 2)
        feed(fed, second, [], first[::-1].tolist())
        fed.require_draw(CPU)
    with pytest.raises(RuntimeError, match="this step has no draw"):
        fed.require_draw(CPU)


def test_what_was_named_counts_once_it_is_added() -> None:
    """A micro-batch that ran out of memory is named twice and added once."""
    sampler = a_sampler()
    fed, drawn = FedItems(sampler), sampler.draw()
    fed.named(drawn, 40)
    feed(fed, drawn)
    fed.require_draw(CPU)
    with pytest.raises(RuntimeError, match="this step has no draw"):  # the draw is used up
        fed.require_draw(CPU)


@pytest.mark.parametrize("fault", ["an item twice", "an item left out", "another item", "nothing"])
def test_anything_else_is_refused_and_leaves_the_draw_unused(fault: str) -> None:
    sampler = a_sampler()
    drawn = sampler.draw().tolist()
    other = next(item for item in range(40) if item not in drawn)
    micro_batches = {
        "an item twice": [drawn, drawn[:1]],
        "an item left out": [drawn[1:]],
        "another item": [[other, *drawn[1:]]],
        "nothing": [],
    }[fault]
    wrong, right = FedItems(sampler), FedItems(sampler)
    feed(wrong, *micro_batches)
    with pytest.raises(RuntimeError, match="the draw holds"):
        wrong.require_draw(CPU)
    feed(right, drawn)
    right.require_draw(CPU)


def test_a_sampler_needs_names_and_no_more_names_than_units() -> None:
    with pytest.raises(RuntimeError, match="name the drawn items"):
        FedItems(a_sampler()).named(None, 3)
    for sampler in (a_sampler(), None):
        assert FedItems(sampler).named([4, 5], 3)[0] == 2, "the third unit only fills up"
        with pytest.raises(RuntimeError, match="2 items in a micro-batch of 1 units"):
            FedItems(sampler).named([4, 5], 1)


def test_without_a_sampler_nothing_is_compared_and_the_name_says_so() -> None:
    fed = FedItems(None)
    assert fed.named(None, 3).tolist() == [0, 0]
    feed(fed, [1, 2])
    fed.require_draw(CPU)
    names = [FedItems(one).sampler_name for one in (None, a_sampler(), PoissonSampler(40, 0.25))]
    assert names == [NOT_SHOWN, FIXED_KEY, SAMPLER]


@pytest.mark.parametrize("how", ["gather", "reduce"])
@pytest.mark.parametrize("keys", [(SECRET, SECRET), (SECRET, FIXED), (FIXED, SECRET), (FIXED, FIXED)])
def test_noise_is_secret_if_it_is_on_every_rank(how: str, keys: tuple[str, str]) -> None:
    def work(rank: int, gather: Any) -> str:
        sampler = a_sampler()
        meet = {"gather": gather, "reduce": lambda own: gather(own).view(2, -1).sum(0)}[how]
        fed = FedItems(sampler, noise_key=keys[rank], **{how: meet}, world_size=2)
        feed(fed, sampler.draw()[rank::2])
        fed.require_draw(CPU)
        return fed.noise_key

    assert run_ranks(2, work) == [FIXED if FIXED in keys else SECRET] * 2


@pytest.mark.parametrize("how", ["gather", "reduce"])
@pytest.mark.parametrize("complete", [True, False])
def test_ranks_add_up_what_they_were_fed(how: str, complete: bool) -> None:
    def work(rank: int, gather: Any) -> str:
        sampler = a_sampler()
        own = sampler.draw()[rank::2]
        meet = {"gather": gather, "reduce": lambda own: gather(own).view(2, -1).sum(0)}[how]
        fed = FedItems(sampler, **{how: meet}, world_size=2)
        if complete or rank == 0:
            feed(fed, own)
        try:
            fed.require_draw(CPU)
        except RuntimeError as error:
            return str(error)
        return "the draw"

    for found in run_ranks(2, work):
        assert found == "the draw" if complete else "the draw holds" in found
