"""Draws are Poisson: each example independently, at every step. Dealing is a partition with little padding."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dptune import InvalidArgument, Keystream, PoissonSampler, deal, sampling
from dptune.keystream import new_key
from dptune.sampling import Parts

EXAMPLES, Q, STEPS = 300, 0.07, 4000


@pytest.fixture(scope="module")
def presence() -> np.ndarray:
    """[step, example]: 1 where the example was drawn."""
    sampler = PoissonSampler(EXAMPLES, Q, Keystream.for_tests(11))
    found = np.zeros((STEPS, EXAMPLES))
    for step in range(STEPS):
        found[step, sampler.draw()] = 1
    return found


def within(counts: np.ndarray, trials: int, q: float) -> bool:
    """Chi-square test of binomial counts with a known q; about 1e-6 of all keys would fail it."""
    statistic = ((counts - trials * q) ** 2 / (trials * q * (1 - q))).sum()
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], df=len(counts))
    return low < statistic < high


def test_each_example_is_drawn_binomially_with_q(presence: np.ndarray) -> None:
    assert within(presence.sum(0), STEPS, Q)
    assert abs(presence.mean() - Q) < 5 * (Q * (1 - Q) / presence.size) ** 0.5


def test_the_number_drawn_is_binomial_too_and_not_fixed(presence: np.ndarray) -> None:
    """Fixed-size batches, shuffled epochs and drawing with replacement have a different variance."""
    assert within(presence.sum(1), EXAMPLES, Q)


def test_examples_are_independent_of_each_other(presence: np.ndarray) -> None:
    correlations = np.corrcoef(presence.T)[np.triu_indices(EXAMPLES, 1)] * STEPS**0.5
    assert abs(correlations).max() < 6.5  # 45,000 pairs
    assert abs(correlations.std() - 1) < 0.03


def test_steps_are_independent_of_each_other(presence: np.ndarray) -> None:
    """In a shuffled epoch, an example does not occur again before all others have occurred."""
    for lag in (1, 2, round(1 / Q)):
        together = (presence[:-lag] * presence[lag:]).sum()
        expected = (STEPS - lag) * EXAMPLES * Q**2
        assert abs(together - expected) < 5 * expected**0.5


@given(count=st.integers(1, 400), q=st.floats(0.001, 1.0), seed=st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_draw_is_a_sorted_set_of_indices(count: int, q: float, seed: int) -> None:
    draw = PoissonSampler(count, q, Keystream.for_tests(seed)).draw()
    assert draw.dtype == np.int64
    assert (np.diff(draw) > 0).all()
    assert len(draw) == 0 or (draw[0] >= 0 and draw[-1] < count)


@pytest.mark.parametrize("count", [1, 99, 100, 101, 1234])
def test_a_large_data_set_is_decided_in_parts_that_draw_the_same(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(sampling, "_AT_ONCE", 100)
    sampler, stream = PoissonSampler(count, 0.3, Keystream.for_tests(2)), Keystream.for_tests(2)
    for _ in range(3):
        assert np.array_equal(sampler.draw(), np.flatnonzero(stream.uniforms(count) < 0.3))


def test_a_draw_from_ten_million_examples_takes_the_memory_of_the_draw() -> None:
    sampler = PoissonSampler(10_000_000, 1e-4)
    tracemalloc.start()
    try:
        drawn = sampler.draw()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 800 < len(drawn) < 1200
    assert peak < 4 << 20  # all uniforms would take 80 MB


def test_a_probability_of_one_draws_everyone() -> None:
    sampler = PoissonSampler(50, 1.0)
    for _ in range(20):
        assert np.array_equal(sampler.draw(), np.arange(50))


def test_empty_draws_happen_as_often_as_they_should() -> None:
    sampler = PoissonSampler(10, 0.05, Keystream.for_tests(4))
    empty = sum(len(sampler.draw()) == 0 for _ in range(3000))
    expected = 0.95**10
    assert abs(empty / 3000 - expected) < 5 * (expected * (1 - expected) / 3000) ** 0.5


def test_ranks_that_share_a_key_see_the_same_draws_and_others_do_not() -> None:
    key = new_key()
    one, other = (PoissonSampler(500, 0.3, Keystream.shared(key)) for _ in range(2))
    draws = [one.draw() for _ in range(3)]
    assert all(np.array_equal(draw, other.draw()) for draw in draws)
    assert not np.array_equal(draws[0], draws[1])
    assert not np.array_equal(PoissonSampler(500, 0.3).draw(), PoissonSampler(500, 0.3).draw())


def test_seeds_do_not_reach_the_draws() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(PoissonSampler(500, 0.3).draw().tolist())
    assert draws[0] != draws[1]


@pytest.mark.parametrize(("count", "q", "named"), [(0, 0.5, "num_examples=0"), (5, 0.0, "0.0"), (5, 1.1, "1.1")])
def test_a_sampler_that_cannot_be_is_refused(count: int, q: float, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        PoissonSampler(count, q)


def dealt_in_lists(
    draw: np.ndarray, lengths: np.ndarray, token_budget: int, ranks: int, max_padding: float
) -> list[list[list[int]]]:
    """Oracle: `deal` item by item, in lists."""
    descending = draw[np.argsort(-lengths[draw], kind="stable")].tolist()
    rows = [descending[start : start + ranks] for start in range(0, len(descending), ranks)]
    cuts, start, tokens = [], 0, 0
    for number, row in enumerate(rows):
        padded, own = lengths[rows[start][0]] * (number - start + 1), sum(lengths[row])
        if number > start and (padded > token_budget or (tokens + own) / ranks < (1 - max_padding) * padded):
            cuts.append(rows[start:number])
            start, tokens = number, 0
        tokens += own
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for cut in [*cuts, rows[start:]] if rows else []:
        for parts in dealt:
            parts.append([])
        for row in cut:
            for rank, item in zip(sorted(range(ranks), key=load.__getitem__), row, strict=False):
                dealt[rank][-1].append(item)
                load[rank] += lengths[item]
    return dealt


@given(seed=st.integers(0, 1000), count=st.integers(0, 90), ranks=st.integers(1, 5), budget=st.integers(1, 900))
@settings(max_examples=200, deadline=None)
def test_dealing_in_arrays_is_dealing_item_by_item(seed: int, count: int, ranks: int, budget: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, chance.integers(2, 200), 90)
    draw = np.sort(chance.choice(90, count, replace=False))
    for max_padding in (0.05, 0.4, 1.0):
        found = deal(draw, lengths, token_budget=budget, ranks=ranks, max_padding=max_padding)
        assert [[part.tolist() for part in parts] for parts in found] == dealt_in_lists(
            draw, lengths, budget, ranks, max_padding
        )


@pytest.mark.parametrize("ranks", [1, 3])
def test_dealing_a_large_validation_set_takes_a_few_bytes_per_row(ranks: int) -> None:
    rows, lengths = np.arange(200_000), np.random.default_rng(0).integers(1, 65, 200_000)
    tracemalloc.start()
    try:
        deal(rows, lengths, token_budget=8192, ranks=ranks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(rows)


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=120),
    token_budget=st.integers(1, 1000),
    ranks=st.integers(1, 9),
    max_padding=st.sampled_from([0.0, 0.05, 0.3]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_dealing_is_a_partition_with_as_many_micro_batches_on_every_rank(
    lengths: list[int], token_budget: int, ranks: int, max_padding: float, data: st.DataObject
) -> None:
    draw = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(lengths)))))), dtype=np.int64)
    sizes = np.array(lengths)
    dealt = deal(draw, sizes, token_budget=token_budget, ranks=ranks, max_padding=max_padding)
    assert len(dealt) == ranks
    assert len({len(parts) for parts in dealt}) == 1
    assert sorted(index for parts in dealt for part in parts for index in part) == draw.tolist()
    for parts in dealt:
        for part in parts:
            assert part.dtype == np.int64
            assert len(part) <= 1 or len(part) * sizes[part].max() <= token_budget
    assert all(any(len(parts[step]) for parts in dealt) for step in range(len(dealt[0])))  # none is empty on all ranks


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_empty_draw_has_no_micro_batch(ranks: int) -> None:
    assert deal(np.array([], dtype=np.int64), np.array([3, 4]), token_budget=10, ranks=ranks) == [[]] * ranks


def text_lengths(count: int, seed: int) -> np.ndarray:
    """Lengths like those of abstracts cut at 512 tokens."""
    return np.random.default_rng(seed).lognormal(5.4, 0.5, count).clip(8, 512).astype(np.int64)


@pytest.mark.parametrize("size", [64, 256, 2048])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_at_most_one_token_in_twenty_is_padding(size: int, ranks: int) -> None:
    for seed in range(5):
        lengths = text_lengths(size, seed)
        dealt = deal(np.arange(size), lengths, token_budget=2048, ranks=ranks)
        padded = sum(len(part) * lengths[part].max() for parts in dealt for part in parts if len(part))
        assert lengths.sum() / padded >= 0.95


def test_the_token_budget_is_used() -> None:
    """Examples of equal length fill the budget: 2048 examples of 64 tokens are 64 micro-batches of 32."""
    dealt = deal(np.arange(2048), np.full(2048, 64), token_budget=2048)
    assert [len(part) for part in dealt[0]] == [32] * 64


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("each", [64, 200])
def test_no_rank_has_much_more_to_do_than_the_others(ranks: int, each: int) -> None:
    for seed in range(5):
        lengths = text_lengths(ranks * each, seed)
        dealt = deal(np.arange(len(lengths)), lengths, token_budget=2048, ranks=ranks)
        tokens = [sum(lengths[part].sum() for part in parts) for parts in dealt]
        assert max(tokens) <= 1.05 * np.mean(tokens)
        waited_for = [max(lengths[parts[step]].sum() for parts in dealt) for step in range(len(dealt[0]))]
        assert sum(waited_for) <= 1.1 * np.mean(tokens)  # the slowest rank of each micro-batch


REAL = json.loads((Path(__file__).parents[2] / "benchmarks" / "lengths.json").read_text())


def lengths_like(kind: str, count: int, seed: int) -> np.ndarray:
    """Tokens of `count` examples of a kind of text."""
    rng = np.random.default_rng(seed)
    if kind in REAL:
        return rng.choice([min(512, prompt + answer) for prompt, answer in REAL[kind]["lengths"]], count)
    drawn = {
        "uniform": lambda: rng.uniform(8, 512, count),
        "exponential": lambda: 8 + rng.exponential(100, count),
        "log-normal": lambda: rng.lognormal(5, 1, count).clip(8, 512),
        "constant": lambda: np.full(count, 300),
    }
    return drawn[kind]().astype(np.int64)


@pytest.mark.parametrize("kind", ["uniform", "exponential", "log-normal", "constant", *REAL])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("each", [64, 101.5, 300])
def test_the_slowest_rank_has_at_most_a_twentieth_more_than_the_mean(kind: str, ranks: int, each: float) -> None:
    for seed in range(5):
        lengths = lengths_like(kind, 2 * int(ranks * each), seed)
        draw = np.sort(np.random.default_rng(seed).permutation(len(lengths))[: int(ranks * each)])
        dealt = deal(draw, lengths, token_budget=2048, ranks=ranks)
        tokens = [sum(lengths[part].sum() for part in parts) for parts in dealt]
        assert max(tokens) <= 1.05 * np.mean(tokens)
        assert len({len(parts) for parts in dealt}) == 1
        assert sorted(index for parts in dealt for part in parts for index in part) == draw.tolist()
        padded = sum(len(part) * lengths[part].max() for parts in dealt for part in parts if len(part))
        assert lengths[draw].sum() >= 0.95 * padded


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=100),
    token_budget=st.integers(1, 20_000),
    ranks=st.integers(1, 8),
    max_padding=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_padding_stays_under_its_bound_whatever_the_lengths(
    lengths: list[int], token_budget: int, ranks: int, max_padding: float
) -> None:
    sizes = np.array(lengths)
    dealt = deal(np.arange(len(sizes)), sizes, token_budget=token_budget, ranks=ranks, max_padding=max_padding)
    padded = sum(len(part) * sizes[part].max() for parts in dealt for part in parts if len(part))
    assert sizes.sum() >= (1 - max_padding) * padded - 1e-6


def test_padding_without_a_bound_starts_no_micro_batch() -> None:
    lengths = np.array([1, 500, 1, 1])
    assert len(deal(np.arange(4), lengths, token_budget=2000, max_padding=1.0)[0]) == 1
    assert len(deal(np.arange(4), lengths, token_budget=1999, max_padding=1.0)[0]) == 2


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_no_rank_always_gets_the_longest_of_a_row(ranks: int) -> None:
    """With evenly spaced lengths in an even number of rows, giving to the least loaded rank makes the sums equal."""
    lengths = np.arange(10, 10 + 6 * ranks)
    dealt = deal(np.arange(len(lengths)), lengths, token_budget=10_000, ranks=ranks, max_padding=0.9)
    assert len({sum(lengths[part].sum() for part in parts) for parts in dealt}) == 1


@pytest.mark.parametrize("changed", [{"token_budget": 0}, {"ranks": 0}, {"token_budget": 1.5}])
def test_a_deal_that_cannot_be_is_refused(changed: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(changed))):
        deal(np.arange(2), np.array([3, 4]), **({"token_budget": 10} | changed))


@pytest.mark.parametrize("name", ["num_examples", "sampling_probability"])
def test_settings_cannot_change_after_they_were_compared_with_the_configuration(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(PoissonSampler(500, 0.3), name, 1)


# --- weights ---

PARTS = Parts((200, 60, 140), (1.0, 4.0, 2.0))


def test_an_example_is_drawn_as_often_as_its_weight_says() -> None:
    """Each example binomially with the probability of its part; the average batch is as asked."""
    largest, steps = 0.2, 4000
    sampler = PoissonSampler(400, largest, Keystream.for_tests(12), parts=PARTS)
    counts, drawn = np.zeros(400), []
    for _ in range(steps):
        draw = sampler.draw()
        assert (np.diff(draw) > 0).all()
        counts[draw] += 1
        drawn.append(len(draw))
    for part, q in zip(np.split(counts, [200, 260]), (0.05, 0.2, 0.1), strict=True):
        assert within(part, steps, q)
        assert abs(part.mean() / steps - q) < 5 * (q * (1 - q) / (steps * len(part))) ** 0.5
    assert abs(np.mean(drawn) - largest * PARTS.effective_size) < 5 * (36 / steps) ** 0.5
    assert PARTS.effective_size == pytest.approx(50 + 60 + 70)


def test_weights_do_not_change_draws_if_they_are_equal() -> None:
    alike, plain = (
        PoissonSampler(300, 0.3, Keystream.for_tests(1), parts=parts) for parts in (Parts((100, 200), (7, 7)), None)
    )
    assert np.array_equal(alike.draw(), plain.draw())


def test_large_parts_are_decided_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for at_once in (1 << 16, 7):
        monkeypatch.setattr(sampling, "_AT_ONCE", at_once)
        draws.append(PoissonSampler(400, 0.5, Keystream.for_tests(3), parts=PARTS).draw())
    assert np.array_equal(*draws)


@pytest.mark.parametrize(
    ("sizes", "weights", "named"),
    [((), (), "weights"), ((3,), (1.0, 2.0), "weights"), ((3, 0), (1.0, 2.0), "sizes=0"), ((3, 3), (1.0, 0.0), "0.0")],
)
def test_parts_that_cannot_be_are_refused(sizes: tuple[int, ...], weights: tuple[float, ...], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        Parts(sizes, weights)


def test_parts_of_another_data_set_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="add up to 400, but there are 300 examples"):
        PoissonSampler(300, 0.1, parts=PARTS)


# --- cut draws ---


@pytest.mark.parametrize("most", [1, 12, 21, 400])
def test_a_cut_draw_is_part_of_the_draw_and_the_next_draws_stay(most: int) -> None:
    plain = PoissonSampler(EXAMPLES, Q, Keystream.for_tests(3))
    cut = PoissonSampler(EXAMPLES, Q, Keystream.for_tests(3), max_batch=most)
    sizes = []
    for _ in range(50):
        whole, kept = plain.draw(), cut.draw()
        assert len(kept) == min(most, len(whole))
        assert (np.diff(kept) > 0).all()
        assert set(kept) <= set(whole)
        sizes.append(len(whole))
    assert max(sizes) > 21, "some are cut"


def test_each_example_of_a_draw_is_as_likely_to_stay() -> None:
    """Of 6 of 8 or more examples; all pairs are as likely too."""
    most, steps = 6, 20_000
    sampler = PoissonSampler(10, 0.8, Keystream.for_tests(5), max_batch=most)
    found = np.zeros((steps, 10))
    for step in range(steps):
        found[step, sampler.draw()] = 1
    chances = stats.binom.pmf(np.arange(11), 10, 0.8)
    stays = (chances * np.minimum(np.arange(11), most)).sum() / 10
    assert within(found.sum(0), steps, stays)
    size = np.minimum(np.arange(11), most)
    pair = (chances * size * (size - 1)).sum() / 90
    together = (found.T @ found)[np.triu_indices(10, 1)]
    assert abs(together - steps * pair).max() < 5 * (steps * pair) ** 0.5


@given(count=st.integers(2, 60), q=st.floats(0.05, 1.0), most=st.integers(1, 30), seed=st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_one_example_more_enters_alone_or_in_the_place_of_another(count: int, q: float, most: int, seed: int) -> None:
    """With the same key: what the accounting of cut draws takes for granted."""
    without, within = (
        set(PoissonSampler(size, q, Keystream.for_tests(seed), max_batch=most).draw()) for size in (count, count + 1)
    )
    entered, left = within - without, without - within
    assert entered <= {count}
    assert len(left) <= len(entered), "nobody is pushed out unless the new example enters"
    assert not left or len(without) == most, "and only of a full batch"


def test_draws_are_named_by_what_epsilon_depends_on() -> None:
    assert PoissonSampler(9, 0.5).name == "Poisson"
    assert PoissonSampler(9, 0.5, max_batch=7).name == "Poisson, cut"
    assert PoissonSampler(9, 0.5, Keystream.for_tests(1), max_batch=7).name == "Poisson under a fixed key"


# --- cyclic draws ---


def test_each_example_is_in_one_group_and_groups_take_turns() -> None:
    """Each draw is of its group alone, and an example's draws are a whole number of turns apart."""
    bands, steps = 4, 400
    sampler = PoissonSampler(300, 0.2, Keystream.for_tests(1), noise_bands=bands)
    assert sampler._groups is not None
    found = np.zeros((steps, 300), dtype=bool)
    for step in range(steps):
        draw = sampler.draw()
        assert (sampler._groups[draw] == step % bands).all()
        found[step, draw] = True
    of_groups = np.bincount(sampler._groups, minlength=bands)
    assert within(of_groups, 300, 1 / bands)
    assert within(found.sum(0), steps // bands, bands * 0.2)
    for example in found.T:
        assert len(set(np.flatnonzero(example) % bands)) == 1
    own = found[:, sampler._groups == 0][::bands]
    pairs = np.corrcoef(own.T)[np.triu_indices(own.shape[1], 1)]
    assert abs(pairs.mean()) < 0.01, "examples are drawn independently"


def test_a_group_depends_on_the_key_and_the_example_alone() -> None:
    """So one example more leaves the groups of all others."""
    groups = [PoissonSampler(n, 0.1, Keystream.for_tests(5), noise_bands=8)._groups for n in (500, 501)]
    assert groups[0] is not None
    assert groups[1] is not None
    assert np.array_equal(groups[0], groups[1][:500])
    other = PoissonSampler(500, 0.1, noise_bands=8)._groups
    assert other is not None
    assert (other != groups[0]).any()


def test_a_forgotten_draw_leaves_its_turn() -> None:
    sampler = PoissonSampler(300, 0.25, Keystream.for_tests(1), noise_bands=4)
    assert sampler._groups is not None
    used = sampler.draw()
    sampler.draw()
    sampler.draw()
    sampler._use(len(used), sampling.checksum_of_items(used))
    sampler._forget()
    for turn in (1, 2, 3, 0):
        assert set(sampler._groups[sampler.draw()]) == {turn}


def test_one_band_draws_as_before_and_large_sets_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, one = (PoissonSampler(300, 0.3, Keystream.for_tests(1), **how) for how in ({}, {"noise_bands": 1}))
    assert np.array_equal(plain.draw(), one.draw())
    draws = []
    for at_once in (1 << 16, 7):
        monkeypatch.setattr(sampling, "_AT_ONCE", at_once)
        draws.append(PoissonSampler(400, 0.3, Keystream.for_tests(3), noise_bands=2).draw())
    assert np.array_equal(*draws)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"noise_bands": 0}, r"^noise_bands=0: "),
        ({"noise_bands": 65}, r"^noise_bands=65: give at most 64"),
        ({"noise_bands": 11}, r"^noise_bands=11: rows would be drawn with probability 1.1 .*give at most 10"),
        ({"noise_bands": 2, "max_batch": 5}, r"^noise_bands=2: draws that are cut cannot take turns"),
        ({"noise_bands": 2, "parts": Parts((4, 5), (1.0, 2.0))}, r"^noise_bands=2: draws with weights"),
    ],
)
def test_turns_that_cannot_be_are_refused(how: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        PoissonSampler(9, 0.1, **how)
    assert PoissonSampler(9, 0.1, noise_bands=2).name == "Poisson, cyclic"


def test_a_cut_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^max_batch=0: "):
        PoissonSampler(9, 0.5, max_batch=0)
    with pytest.raises(InvalidArgument, match=r"^max_batch=7: draws with weights cannot be cut"):
        PoissonSampler(9, 0.5, parts=Parts((4, 5), (1.0, 2.0)), max_batch=7)
