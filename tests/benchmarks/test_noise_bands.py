"""The table of noise bands compares them with independent noise at the same epsilon."""

from __future__ import annotations

import numpy as np
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


def test_the_noise_of_geometric_bands_is_a_sum_of_independent_ones() -> None:
    steps, count = 23, 4
    bands = noise_bands.geometric_bands(count, steps)
    first, second = bands.coefficients[:2]
    ratio = second / first
    assert 0.5 < ratio < 1
    expected = np.zeros((steps, steps))
    for step in range(steps):
        for turn in range(step // count + 1):
            latest = step - count * turn
            expected[step, latest] += ratio ** (count * turn) / first
            if latest:
                expected[step, latest - 1] -= ratio ** (count * turn + 1) / first
    np.testing.assert_allclose(np.linalg.inv(bands.matrix(steps)), expected, atol=1e-12)


def test_the_best_bands_are_compared_with_geometric_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_bands, "GEOMETRIC_STEPS", (50,))
    monkeypatch.setattr(noise_bands, "GEOMETRIC_BANDS", (2, 16))
    ((steps, two, sixteen),) = noise_bands.geometric_lines()
    assert (steps, two) == ("50", "+0.0%"), "with two bands there are no others"
    more = noise_bands.geometric_bands(16, 50).error(50) / best_bands(16, 50).error(50) - 1
    assert sixteen == f"{more:+.1%}"
    assert more > 0.01
