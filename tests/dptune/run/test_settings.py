"""Privacy settings that contradict each other are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.run.settings import PrivacySettings, noise_bands_of

DELTA = 1e-4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"noise_multiplier": None}, "noise_multiplier=None"),
        ({"target_epsilon": 3.0}, "target_epsilon=3.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": None, "target_epsilon": 0.0}, "target_epsilon=0.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{named}: "):
        PrivacySettings(**({"noise_multiplier": 1.0, "delta": DELTA} | changed))


@pytest.mark.parametrize("given", ["0", "-1", "2.5", "many", 0])
def test_a_flag_of_noise_bands_is_a_count_or_auto(given: str | int) -> None:
    assert (noise_bands_of("8"), noise_bands_of(8), noise_bands_of("auto")) == (8, 8, "auto")
    with pytest.raises(InvalidArgument, match=r"^noise_bands="):
        noise_bands_of(given)
