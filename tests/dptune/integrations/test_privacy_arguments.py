"""Privacy flags: exactly one of noise multiplier and target epsilon, and values in range."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.integrations.privacy_arguments import ONLY_PRIVATE, PrivacyArguments


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "--noise_multiplier"),
        ({"noise_multiplier": 1.0, "target_epsilon": 8.0}, "--target_epsilon"),
        ({"noise_multiplier": 0.0}, "--noise_multiplier"),
        ({"target_epsilon": -1.0}, "--target_epsilon"),
        ({"target_epsilon": 1.0, "clip_norm": 0.0}, "--clip_norm"),
        ({"target_epsilon": 1.0, "delta": 1.0}, "--delta"),
    ],
)
def test_a_wrong_value_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        PrivacyArguments(**given)


def test_without_privacy_no_noise_need_be_named() -> None:
    assert PrivacyArguments(disable_dp=True).noise_multiplier is None


@pytest.mark.parametrize("name", [one.name for one in fields(PrivacyArguments)])
def test_each_setting_is_read_without_privacy_or_refused(name: str) -> None:
    read = {"disable_dp", "insecure_test_seed", "max_batch"}  # the draws stay
    assert (name in ONLY_PRIVATE) != (name in read)
    given: dict[str, Any] = {name: 0.25}
    if name in ONLY_PRIVATE:
        with pytest.raises(InvalidArgument, match=f"^--{name}=0.25: is not read with --disable_dp"):
            PrivacyArguments(disable_dp=True, **given)
    else:
        PrivacyArguments(**({"disable_dp": True} | given))
