"""How much data an epsilon takes: the stated noise and number of examples are enough, and little more than needed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dptune._validate import InvalidArgument
from dptune.accounting import Cut, Spend, compose, data_needed, epsilon, noise_multiplier
from dptune.accounting.data_needed import Work, describe_data_needed, noise_if_any

WORK = Work(batch=256, steps=30, delta=1e-5)


def spent(work: Work, num_examples: float, sigma: float) -> float:
    """Epsilon at the sampling probability of so many examples."""
    q, delta, size = work.batch / num_examples, work.delta_of(num_examples), work.group_size
    return epsilon(noise_multiplier=sigma, sampling_probability=q, steps=work.steps, delta=delta, group_size=size)


@pytest.mark.parametrize(("num_examples", "target"), [(400, 1.0), (4000, 8.0), (90_000, 3.0)])
def test_the_noise_is_enough_and_hardly_more(num_examples: int, target: float) -> None:
    found = WORK.noise(num_examples, target)
    assert found is not None
    least = noise_multiplier(
        target_epsilon=target,
        delta=WORK.delta_of(num_examples),
        sampling_probability=WORK.batch / num_examples,
        steps=WORK.steps,
    )
    assert least <= found < 1.06 * least
    assert spent(WORK, num_examples, found) <= target


@pytest.mark.parametrize("work", [WORK, Work(batch=64, steps=10, delta=1e-4, group_size=3)])
@pytest.mark.parametrize(("target", "sigma"), [(3.0, 1.0), (8.0, 2.0)])
def test_so_many_examples_are_enough_and_few_less_are_not(work: Work, target: float, sigma: float) -> None:
    found = work.examples(target, sigma)
    assert found is not None
    assert found > work.batch
    assert spent(work, found, sigma) <= target
    assert spent(work, 0.9 * found, sigma) > target


def test_a_batch_is_enough_where_every_example_in_every_step_is() -> None:
    assert WORK.examples(8.0, sigma=50.0) == WORK.batch


def test_no_number_of_examples_is_enough_for_hardly_any_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_needed, "_MOST", 10_000)
    assert WORK.examples(3.0, sigma=0.5) is None
    assert describe_data_needed(WORK, 4000, [1.0])[-2] == "examples for noise 1   too many for epsilon 1"


def test_delta_is_at_most_a_tenth_of_one_in_n() -> None:
    assert WORK.delta_of(1000) == 1e-5
    assert WORK.delta_of(10**6) == pytest.approx(1e-7)


def test_a_target_out_of_reach_is_no_noise_and_other_mistakes_are_refused() -> None:
    setting = {"delta": 1e-5, "sampling_probability": 1.0, "steps": 1}
    assert noise_if_any(target_epsilon=1e6, **setting) is None
    with pytest.raises(InvalidArgument, match=r"^delta=2\.0: "):
        noise_if_any(target_epsilon=1.0, **setting | {"delta": 2.0})
    with pytest.raises(InvalidArgument, match=r"^steps=0: "):
        Work(batch=1, steps=0, delta=1e-5)


def test_the_table_has_the_noise_of_fewer_and_more_examples() -> None:
    title, head, *rows, needed, _ = describe_data_needed(WORK, 4000, [3.0, 8.0], "authors")
    assert "more or fewer authors, this batch and these steps" in title
    assert head.split() == ["authors", "epsilon", "3", "epsilon", "8"]
    cells = [row.replace(",", "").split() for row in rows]
    assert [int(first) for first, *_ in cells] == [400, 4000, 40_000]
    for first, *shown in cells:
        for target, text in zip([3.0, 8.0], shown, strict=True):
            exact = WORK.noise(int(first), target)
            assert exact is not None
            assert exact <= float(text) <= exact + 0.1 * 10 ** math.floor(math.log10(exact))
    assert needed.startswith("authors for noise 1    ")
    told = [int(part.split()[0].replace(",", "")) for part in needed.removeprefix("authors for noise 1").split(", ")]
    for number, target in zip(told, [3.0, 8.0], strict=True):
        assert (WORK.examples(target) or 0) <= number <= 1.1 * (WORK.examples(target) or 0)


def test_a_handful_of_examples_is_told_as_a_whole_number() -> None:
    """A batch of 6 of 6: every example is in every step."""
    assert (
        describe_data_needed(Work(batch=6, steps=1, delta=1e-3), 6, [50.0])[-2]
        == "examples for noise 1   6 for epsilon 50"
    )


def test_amounts_below_the_batch_are_left_out() -> None:
    rows = [line.split() for line in describe_data_needed(WORK, 300, [8.0])[2:-2]]
    assert [first for first, _ in rows] == ["300", "3,000"]


def test_noise_bands_count_turns_and_are_fewer_where_batches_are_large() -> None:
    bands = replace(WORK, noise_bands=4)
    assert bands.spend(1.0, 4000) == Spend(1.0, 4 * 256 / 4000, 8)
    assert bands.spend(1.0, 600) == Spend(1.0, 2 * 256 / 600, 15)
    assert bands.spend(1.0, 256) == WORK.spend(1.0, 256) == Spend(1.0, 1.0, 30)
    found = bands.noise(4000, 3.0)
    assert found is not None
    assert compose([bands.spend(found, 4000)], delta=WORK.delta_of(4000)) <= 3.0
    assert compose([bands.spend(0.9 * found, 4000)], delta=WORK.delta_of(4000)) > 3.0


def test_the_noise_covers_cut_draws_and_few_examples_are_never_cut() -> None:
    cut = replace(WORK, max_batch=290)
    found = cut.noise(4000, 3.0)
    assert found is not None
    setting = {"sampling_probability": 256 / 4000, "steps": 30, "delta": WORK.delta_of(4000)}
    assert epsilon(noise_multiplier=found, **setting, cut=Cut(290, 4000)) <= 3.0
    assert epsilon(noise_multiplier=0.9 * found, **setting, cut=Cut(290, 4000)) > 3.0
    assert cut.noise(280, 3.0) == WORK.noise(280, 3.0)
    needed, plain = cut.examples(3.0), WORK.examples(3.0)
    assert needed is not None
    assert plain is not None
    assert needed > 1.1 * plain
