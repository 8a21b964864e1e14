"""Flags of privacy: what they default to, what they mean together, and what is refused."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from tests.classifier_settings import settings


def test_privacy_defaults_to_epsilon_8() -> None:
    engine = settings("--enable_dp", "--clip_norm", "2").budget.settings(trained=1)
    assert engine is not None
    assert (engine.target_epsilon, engine.noise_multiplier, engine.clip_norm) == (8.0, None, 2.0)
    engine = settings("--enable_dp", "--clip_norm", "2", "--noise_multiplier", "1.5").budget.settings(trained=1)
    assert engine is not None
    assert (engine.target_epsilon, engine.noise_multiplier) == (None, 1.5)


def test_a_clip_norm_is_to_be_measured_only_where_a_private_run_was_given_none() -> None:
    assert settings("--enable_dp").budget.clip_norm_is_open
    assert not settings("--enable_dp", "--clip_norm", "2").budget.clip_norm_is_open
    assert not settings().budget.clip_norm_is_open


def test_without_privacy_a_step_is_clipped_as_the_trainer_does() -> None:
    assert settings().budget.plain_max_grad_norm == 1
    assert settings("--clip_norm", "2").budget.plain_max_grad_norm == 2
    assert settings("--clip_norm", "2", "--enable_dp").budget.plain_max_grad_norm is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target_epsilon", "0"), "--target_epsilon=0.0: give a finite number above 0; to train without privacy"),
        (("--target_epsilon", "1", "--noise_multiplier", "1"), "--target_epsilon=1.0: give --target_epsilon or --noi"),
        (("--noise_multiplier", "-1"), "--noise_multiplier=-1.0: give a finite number above 0"),
        (("--clip_norm", "-1"), "--clip_norm=-1.0: give a finite number above 0"),
        (("--delta", "1"), "--delta=1.0: give a number above 0 and below 1"),
    ],
)
def test_a_mistake_names_the_flag(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings(*flags)
