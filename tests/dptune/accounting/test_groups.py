"""Epsilon for a unit of several examples: against integration, the library's own search, and group privacy."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from scipy.stats import binom, norm

from dptune import GaussianNoise, InvalidArgument, Ledger, PrivacyConfig, accounting
from dptune.accounting import Spend, compose, epsilon, max_steps, noise_multiplier, running_epsilon
from dptune.accounting.groups import mixture_of_gaussians, renyi_divergences
from dptune.report.statement import state_privacy

DELTA = 1e-6
SPENDS = [Spend(1.2, 0.03, 100), Spend(0.8, 0.01, 30), Spend(4.0, 0.3, 50), Spend(3.0, 1.0, 4)]
SETTING: dict[str, Any] = {"num_examples": 100, "expected_batch_size": 4.0, "steps": 3, "clip_norm": 1.0}


def divergences(sigma: float, q: float, group_size: int, eps: float) -> tuple[float, float]:
    """Delta of one step at `eps`, by integration without an accountant: for removing and for adding the unit."""
    x, width = np.linspace(-16 * sigma, group_size + 16 * sigma, 2_000_001, retstep=True)
    counts = np.arange(group_size + 1)
    weights = [math.comb(group_size, j) * q**j * (1 - q) ** (group_size - j) for j in counts]
    without = np.exp(-0.5 * (x / sigma) ** 2)
    within = sum(weight * np.exp(-0.5 * ((x - j) / sigma) ** 2) for j, weight in zip(counts, weights, strict=True))
    scale = width / (sigma * math.sqrt(2 * math.pi))
    remove = np.maximum(within - math.exp(eps) * without, 0).sum() * scale
    add = np.maximum(without - math.exp(eps) * within, 0).sum() * scale
    return float(remove), float(add)


@pytest.mark.parametrize(
    ("sigma", "q", "group_size"),
    [(0.8, 0.05, 2), (1.0, 0.02, 4), (3.0, 0.2, 5), (6.0, 0.5, 8), (8.0, 1.0, 3), (2.0, 0.9, 2)],
)
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_one_step_is_the_larger_of_both_directions(sigma: float, q: float, group_size: int, delta: float) -> None:
    found = compose([Spend(sigma, q, 1, group_size)], delta=delta)
    worst = max(divergences(sigma, q, group_size, found))
    assert 0.97 * delta < worst <= delta * (1 + 1e-6)


@pytest.mark.parametrize(("eps", "direction"), [(0.3, 0), (1.5, 0), (0.05, 1), (0.15, 1)])
def test_each_direction_alone(eps: float, direction: int) -> None:
    """The losses of an addition end at -k log(1 - q), here 0.21, so in composed epsilons the removal hides them."""
    step = mixture_of_gaussians(1.5, 0.1, 2, 1e-4)
    pmf = (step._pmf_remove, step._pmf_add)[direction]
    exact = divergences(1.5, 0.1, 2, eps)[direction]
    assert exact * (1 - 1e-9) <= pmf.get_delta_for_epsilon(eps) <= exact * 1.001 + 1e-12


@pytest.mark.parametrize("spend", SPENDS)
def test_a_group_of_one_costs_what_the_library_says_and_the_margin(spend: Spend) -> None:
    step = privacy_loss_distribution.from_gaussian_mechanism(
        spend.noise_multiplier, value_discretization_interval=1e-3, sampling_prob=spend.sampling_probability
    )
    before = step.self_compose(spend.steps).get_epsilon_for_delta(DELTA)
    if spend.sampling_probability < 1:
        assert before < compose([spend._replace(group_size=1)], delta=DELTA, interval=1e-3) < before * (1 + 1e-7)
    setting = dict(zip(("noise_multiplier", "sampling_probability", "steps"), spend, strict=False))
    assert (
        epsilon(**setting, delta=DELTA, group_size=1)
        == epsilon(**setting, delta=DELTA)
        == compose([spend], delta=DELTA)
    )


@pytest.mark.parametrize("spend", SPENDS)
def test_the_mixture_of_one_is_the_subsampled_gaussian(spend: Spend) -> None:
    step = mixture_of_gaussians(spend.noise_multiplier, spend.sampling_probability, 1, 1e-3)
    found = step.self_compose(spend.steps).get_epsilon_for_delta(DELTA)
    assert found == pytest.approx(compose([spend], delta=DELTA, interval=1e-3), rel=1e-6)


@pytest.mark.parametrize(("sigma", "q", "group_size", "steps"), [(2.0, 0.027, 4, 184), (1.0, 0.01, 3, 50)])
def test_the_librarys_own_search_finds_the_same(sigma: float, q: float, group_size: int, steps: int) -> None:
    counts = np.arange(group_size + 1.0)
    step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma, counts, binom.pmf(counts, group_size, q), value_discretization_interval=1e-2
    )
    theirs = step.self_compose(steps).get_epsilon_for_delta(DELTA)
    assert compose([Spend(sigma, q, steps, group_size)], delta=DELTA, interval=1e-2) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("sigma", "q"), [(0.6, 0.01), (1.2, 0.027), (20.0, 0.9), (1e4, 0.3)])
def test_the_divergences_of_a_group_of_one_are_the_librarys(sigma: float, q: float) -> None:
    theirs = RdpAccountant([2, 3, 16, 64, 512])
    theirs.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)))
    np.testing.assert_allclose(renyi_divergences(sigma, q, 1, theirs._orders), theirs._rdp, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("sigma", "q", "group_size"), [(0.7, 0.02, 2), (2.0, 0.03, 4), (6.0, 0.5, 8), (3.0, 0.99, 3)])
def test_the_divergences_of_a_group_are_those_of_the_mixture(sigma: float, q: float, group_size: int) -> None:
    """Of both directions, summed over draws of the counts, or on a far finer grid."""
    for order in (2, 3):
        counts = np.stack(np.meshgrid(*[np.arange(group_size + 1)] * order)).reshape(order, -1)
        pairs = (counts.sum(0) ** 2 - (counts**2).sum(0)) / 2
        removed = (binom.pmf(counts, group_size, q).prod(0) * np.exp(pairs / sigma**2)).sum()
        x, width = np.linspace(-order * group_size - 16 * sigma, 16 * sigma, 2_000_001, retstep=True)
        within = sum(binom.pmf(j, group_size, q) * norm.pdf(x, j, sigma) for j in range(group_size + 1))
        added = (norm.pdf(x, 0, sigma) ** order * within ** (1 - order)).sum() * width
        (found,) = renyi_divergences(sigma, q, group_size, [order])
        assert found == pytest.approx(math.log(max(removed, added)) / (order - 1), rel=1e-6)


@pytest.mark.parametrize("group_size", [10**4, 10**18])
def test_divergences_that_would_take_too_long_are_left_out(group_size: int) -> None:
    assert renyi_divergences(1.0, 0.01, group_size, [2, 64]).tolist() == [math.inf, math.inf]
    assert compose([Spend(1.0, 0.01, 3, group_size)], delta=1e-20) > 1e6


def group_privacy(spend: Spend, delta: float, group_size: int) -> float:
    """Group privacy: k times one example's epsilon, at the delta that k exp((k - 1) epsilon) scales to `delta`."""
    one = 0.0
    for _ in range(30):
        one = compose([spend], delta=delta / group_size * math.exp((1 - group_size) * one), interval=1e-2)
    return group_size * one


@pytest.mark.parametrize("spend", [Spend(1.2, 0.03, 100), Spend(4.0, 0.3, 50)])
def test_larger_groups_cost_more_and_less_than_group_privacy(spend: Spend) -> None:
    spent = [compose([spend._replace(group_size=k)], delta=DELTA) for k in range(1, 7)]
    assert all(fewer * 1.05 < more for fewer, more in pairwise(spent))
    for group_size in (2, 4):
        assert spent[group_size - 1] < 0.95 * group_privacy(spend, DELTA, group_size)


def test_without_subsampling_it_is_one_gaussian_of_k_times_the_sensitivity() -> None:
    group = compose([Spend(6.0, 1.0, 10, 3)], delta=DELTA)
    assert group == pytest.approx(compose([Spend(2.0, 1.0, 10)], delta=DELTA), rel=1e-3)


@pytest.mark.parametrize(
    ("target", "q", "steps", "group_size"), [(8.0, 0.03, 184, 4), (1.0, 0.01, 500, 8), (0.2, 0.01, 1000, 2)]
)
def test_the_noise_found_keeps_its_promise_and_is_the_smallest_that_does(
    target: float, q: float, steps: int, group_size: int
) -> None:
    setting: dict[str, Any] = {"sampling_probability": q, "steps": steps, "delta": DELTA, "group_size": group_size}
    started = time.process_time()
    sigma = noise_multiplier(target_epsilon=target, **setting)
    assert time.process_time() - started < 15  # 0.4 to 2 s where it was written
    assert epsilon(noise_multiplier=sigma, **setting) <= target < epsilon(noise_multiplier=0.998 * sigma, **setting)
    assert epsilon(noise_multiplier=sigma, **setting | {"group_size": 1}) < 0.7 * target
    del setting["steps"]
    paid = max_steps(target_epsilon=target, noise_multiplier=sigma, at_least=steps, **setting)
    assert steps <= paid <= 1.01 * steps + 1


@pytest.mark.parametrize(
    ("spend", "interval"),
    [(Spend(2.0, 0.03, 100, 4), 1e-4), (Spend(12.0, 0.05, 500, 6), 1e-5), (Spend(30.0, 0.01, 2000, 3), 5e-6)],
)
def test_the_grid_does_not_show_in_what_is_reported(spend: Spend, interval: float) -> None:
    reported = compose([spend], delta=DELTA)
    finer = compose([spend], delta=DELTA, interval=interval)
    assert finer <= reported * (1 + 1e-9) <= 1.002 * finer
    assert reported <= running_epsilon([spend], delta=DELTA) * (1 + 1e-9)


def test_little_noise_on_a_large_group_is_answered_soon_and_from_above() -> None:
    """Its privacy losses are in the thousands, so a fine grid would have tens of millions of points."""
    spend = Spend(0.5, 0.3, 10, 16)
    started = time.process_time()
    found = compose([spend], delta=DELTA)
    assert time.process_time() - started < 40  # 3 s where it was written
    assert found > 16 * compose([spend._replace(group_size=1)], delta=DELTA)


def test_groups_and_single_examples_compose() -> None:
    one, group = Spend(1.2, 0.03, 100), Spend(2.0, 0.03, 50, 4)
    together = compose([one, group], delta=DELTA)
    alone = [compose([spend], delta=DELTA) for spend in (one, group)]
    assert max(alone) < together < sum(alone)


@pytest.mark.parametrize("group_size", [0, -1, 1.5, math.inf])
def test_a_group_size_that_cannot_be_is_refused(group_size: Any, tmp_path: Path) -> None:
    setting: dict[str, Any] = {"sampling_probability": 0.1, "delta": 1e-6, "group_size": group_size}
    calls = [
        lambda: epsilon(noise_multiplier=1.0, steps=3, **setting),
        lambda: noise_multiplier(target_epsilon=1.0, steps=3, **setting),
        lambda: max_steps(target_epsilon=1.0, noise_multiplier=1.0, **setting),
        lambda: PrivacyConfig(**SETTING, noise_multiplier=1.0, delta=1e-4, group_size=group_size),
        lambda: Ledger(tmp_path / "ledger.jsonl", group_size=group_size),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match=f"^group_size={group_size!r}: "):
            call()


def test_the_configuration_accounts_for_its_group() -> None:
    config = PrivacyConfig.for_epsilon(target_epsilon=3.0, **SETTING, delta=1e-4, group_size=5)
    assert 2.97 < config.planned_epsilon() <= 3
    alone = PrivacyConfig(**SETTING, noise_multiplier=config.noise_multiplier, delta=1e-4)
    assert alone.planned_epsilon() < 1.5
    assert (config.sensitivity, config.noise_std) == (alone.sensitivity, alone.noise_std)
    with pytest.raises(InvalidArgument, match=r"^group_size=101: must be at most the 100 examples"):
        PrivacyConfig(**SETTING, noise_multiplier=1.0, delta=1e-4, group_size=101)


def written(path: Path, group_size: int, steps: int) -> Ledger:
    ledger = Ledger(path, group_size=group_size)
    for _ in range(steps):
        ledger.record(noise_multiplier=2.0, sampling_probability=0.04, clip_norm=1.0)
    return ledger


def test_the_ledgers_lines_carry_the_group_size_unless_it_is_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path, 1, 2)
    both = written(path, 4, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("group_size", "absent") for line in lines] == ["absent"] * 2 + [4] * 3
    wanted = [Spend(2.0, 0.04, 2), Spend(2.0, 0.04, 3, 4)]
    assert both.spends == Ledger(path).spends == wanted
    assert Ledger(path).epsilon(1e-4) == accounting.compose(wanted, delta=1e-4)
    assert Ledger(path).running_epsilon(1e-4) == accounting.running_epsilon(wanted, delta=1e-4)


@pytest.mark.parametrize("value", ["0", "-2", "1.5", '"4"', "null", "true", "[4]"])
def test_a_line_with_a_group_size_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "ledger.jsonl"
    written(path, 4, 2)
    path.write_text(path.read_text().replace('"group_size": 4', f'"group_size": {value}'))
    with pytest.raises(InvalidArgument, match="not a ledger entry"):
        Ledger(path)


def test_a_report_needs_a_ledger_of_the_same_group_size(tmp_path: Path) -> None:
    config = PrivacyConfig(**SETTING, noise_multiplier=2.0, delta=1e-4, group_size=4)
    with GaussianNoise(4) as noise:
        stated = state_privacy(config, written(tmp_path / "a", 4, 3), noise, privacy_unit="one author")
        with pytest.raises(InvalidArgument, match=r"with a group size of 1'?: the configuration says 4"):
            state_privacy(config, written(tmp_path / "b", 1, 3), noise, privacy_unit="one author")
    assert stated.group_size == 4
    assert stated.epsilon == config.planned_epsilon()
