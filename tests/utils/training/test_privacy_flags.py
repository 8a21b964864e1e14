"""Flags of privacy: both or neither of clipping and noise, and one privacy unit."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.clipping_styles import Automatic
from dptune.units.unit import EXAMPLE_LEVEL, USER_LEVEL, PrivacyUnit
from utils.training.privacy_flags import PrivacyFlags


def test_flags_make_the_engines_settings_or_none_without_privacy() -> None:
    settings = PrivacyFlags(clip_norm=0.5, noise_multiplier=1.5, delta=1e-6).settings(Automatic(0.1))
    assert settings is not None
    assert (settings.clip_norm, settings.noise_multiplier, settings.delta) == (0.5, 1.5, 1e-6)
    assert settings.clipping == Automatic(0.1)
    assert PrivacyFlags(clip_norm=-1, noise_multiplier=-1).settings() is None


def test_an_open_clip_norm_changes_nothing_else_of_the_plan() -> None:
    given, open_ = (PrivacyFlags(clip_norm=norm, target_epsilon=8.0) for norm in (1.0, "auto"))
    assert (given.clip_norm_is_open, open_.clip_norm_is_open) == (False, True)
    assert open_.is_private
    assert open_.settings() == given.settings()
    assert open_.users_flag == "--privacy_unit"


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        ({"unit_gradient": "sum"}, True),
        ({}, False),
        ({"unit_gradient": "sum", "user_level_method": EXAMPLE_LEVEL}, False),
    ],
)
def test_a_clip_norm_of_single_rows_is_none_for_sums_of_several(method: dict[str, Any], refused: bool) -> None:
    users = {"clip_norm": "auto", "noise_multiplier": 1.0, "privacy_unit": "user", "examples_per_unit": 3}
    if not refused:
        assert PrivacyFlags(**users, **method).clip_norm_is_open
        return
    with pytest.raises(InvalidArgument, match=r"^--clip_norm='auto': is measured on single rows, .* up to 3 of them"):
        PrivacyFlags(**users, **method)


@pytest.mark.parametrize(
    "given",
    [
        {"clip_norm": -1, "noise_multiplier": 1.0},
        {"noise_multiplier": -1},
        {"clip_norm": "auto", "noise_multiplier": -1},
    ],
)
def test_clipping_is_not_turned_off_alone_nor_noise(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=f"--noise_multiplier={given['noise_multiplier']}: .* both -1"):
        PrivacyFlags(**given)


def test_flags_make_the_unit() -> None:
    assert PrivacyFlags(noise_multiplier=1.0).unit == PrivacyUnit()
    users = {"noise_multiplier": 1.0, "privacy_unit": "user", "examples_per_unit": 3}
    assert PrivacyFlags(**users).unit == PrivacyUnit("user", USER_LEVEL, 3, "mean")
    given = PrivacyFlags(**users, user_level_method=EXAMPLE_LEVEL, unit_gradient="sum")
    assert given.unit == PrivacyUnit("user", EXAMPLE_LEVEL, 3, "sum")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"examples_per_unit": 2}, "--examples_per_unit=2: is for authors"),
        ({"audit_canaries": -1}, "--audit_canaries=-1: give a whole number"),
        ({"audit_canaries": 3}, "--audit_canaries=3: give 0, or at least 16"),
        ({"audit_dials": 3}, "--audit_dials=3: give 0, or at least 16"),
        ({"audit_dials": 20, "privacy_unit": "user", "examples_per_unit": 2}, "--audit_dials=20: canaries are rows"),
        (
            {"audit_canaries": 20, "privacy_unit": "user", "examples_per_unit": 2},
            "--audit_canaries=20: canaries are rows",
        ),
        ({"privacy_unit": "user"}, "--examples_per_unit=None: give the maximum"),
        ({"privacy_unit": "user", "examples_per_unit": 0}, "--examples_per_unit=0: "),
        ({"privacy_unit": " ", "examples_per_unit": 2}, "--privacy_unit=' ': give `example`, or the column"),
    ],
)
def test_half_a_unit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        PrivacyFlags(noise_multiplier=1.0, **given)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({}, "--privacy_unit"),
        ({"ignore_users": True}, None),
        ({"privacy_unit": "user", "examples_per_unit": 2}, None),
        ({"clip_norm": -1, "noise_multiplier": -1}, None),  # nothing is protected
    ],
)
def test_rows_are_protected_unnoticed_only_by_a_private_run_without_either_flag(
    given: dict[str, Any], flag: str | None
) -> None:
    assert PrivacyFlags(**{"noise_multiplier": 1.0} | given).users_flag == flag


def test_a_unit_of_users_and_ignoring_them_contradict_each_other() -> None:
    with pytest.raises(InvalidArgument, match="--ignore_users=True: contradicts --privacy_unit"):
        PrivacyFlags(noise_multiplier=1.0, privacy_unit="user", examples_per_unit=2, ignore_users=True)
