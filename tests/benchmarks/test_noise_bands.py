"""The table of noise bands compares them with independent noise at the same epsilon."""

from __future__ import annotations

import pytest

from benchmarks import noise_bands
from dptune.accounting import noise_multiplier
from dptune.bands import best_bands


def test_a_cell_is_the_noise_for_its_turns_times_the_error_of_its_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_bands, "EPSILONS", (8.0,))
    monkeypatch.setattr(noise_bands, "BANDS", (1, 4))
    steps = 30
    own, one = (
        noise_multiplier(target_epsilon=8.0, delta=1e-3, sampling_probability=bands * 0.05, steps=-(-steps // bands))
        for bands in (4, 1)
    )
    less = own * best_bands(4, steps).error(steps) / (one * best_bands(1, steps).error(steps)) - 1
    more = own * best_bands(4, steps).std(steps) / one
    found = list(noise_bands.lines(noise_bands.Setting(400, 20, steps, 1e-3)))
    assert found == [("4", f"{less:+.0%} (x {more:.1f})")]
    assert less < -0.1
    assert more > 1
