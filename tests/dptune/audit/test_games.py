"""A launch is a run of the real engine, and the adversary sees the unit's contributions with the stated noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dptune import InvalidArgument
from dptune.audit.games import Launch, Mechanism, plan_of, play
from dptune.clipping_styles import Adaptive

STEPS, UNITS = 24, 8


def launch(mechanism: Mechanism, q: float = 0.5, block: int = 1) -> Launch:
    return play(mechanism, mechanism.stand_in(), sampling_probability=q, steps=STEPS, block=block)


@pytest.mark.parametrize(
    "how",
    [
        {"ranks": 2},
        {"group_size": 3},
        {"rows_per_unit": 2, "trained": "whole"},
        {"clipping": Adaptive(count_noise=1.0), "clip_norm": 0.1},
    ],
    ids=lambda how: "-".join(how),
)
def test_without_noise_the_release_is_the_sum_of_the_units_that_were_drawn(how) -> None:
    mechanism = Mechanism(noise_multiplier=1e-4, units=UNITS, **how)
    found, directions = launch(mechanism), mechanism.stand_in().contributions()
    assert found.released.shape == (STEPS, directions.shape[1])
    counted = found.counts() * found.coins
    assert np.abs(found.observed(directions) - counted).max() < 2e-3
    assert found.noise(directions).abs().max() < 2e-3
    assert 0 < counted.sum() < found.counts().sum()
    if mechanism.ranks == 2:
        for rank in range(2):
            assert found.noise(directions, rank).abs().max() < 2e-3
            assert found.counts(rank).sum() > 0
    else:
        assert found.shares is None


def test_the_noise_has_the_stated_size_and_ranks_share_it() -> None:
    mechanism = Mechanism(noise_multiplier=3.0, units=UNITS, ranks=2)
    found, directions = launch(mechanism), mechanism.stand_in().contributions()
    assert found.noise(directions).std() == pytest.approx(3, rel=0.07)
    for rank in range(2):
        assert found.noise(directions, rank).std() == pytest.approx(3 / 2**0.5, rel=0.07)


def test_coins_change_by_blocks() -> None:
    coins = launch(Mechanism(noise_multiplier=1.0, units=32), block=8).coins.reshape(3, 8, 32)
    assert (coins == coins[:, :1]).all()
    assert (coins[0] != coins[1]).any() or (coins[1] != coins[2]).any()


def test_the_plan_is_what_is_accounted() -> None:
    plan = plan_of(Mechanism(noise_multiplier=1.0, units=UNITS, group_size=3), 0.25, STEPS)
    assert (plan.sampling_probability, plan.num_examples, plan.unit.group_size) == (0.25, 24, 3)


@pytest.mark.parametrize("name", ["group_size", "rows_per_unit", "ranks", "units"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{name}=0: give a whole number"):
        Mechanism(noise_multiplier=1.0, **{name: 0})


def test_a_failing_rank_ends_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("dptune.audit.games._feed", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        launch(Mechanism(noise_multiplier=1.0, units=UNITS, ranks=2))
    assert torch.is_grad_enabled()
