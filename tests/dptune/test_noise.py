"""The noise: standard normal by every test here, independent, and prepared in advance."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from dptune import GaussianNoise, InvalidArgument, Keystream
from dptune import noise as noise_module
from dptune.grid import grid_of
from dptune.keystream import scratch_for
from dptune.noise import _fine_uniforms, standard_normals

LARGE = 12 * noise_module._CHUNK + 12_345  # several chunks and part of another


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return standard_normals(Keystream.for_tests(1), LARGE).numpy()


def test_moments(values: np.ndarray) -> None:
    n = len(values)
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(stats.skew(values)) < 5 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(values)) < 5 * (24 / n) ** 0.5


def test_distribution_and_tails(values: np.ndarray) -> None:
    assert stats.kstest(values, "norm").pvalue > 1e-6
    for bound in (2.0, 3.0, 4.0):
        for beyond in ((values > bound).sum(), (values < -bound).sum()):
            expected = len(values) * stats.norm.sf(bound)
            assert abs(beyond - expected) < 5 * expected**0.5 + 1
    assert 4.5 < abs(values).max() < 8.6


def test_small_uniforms_are_fine_enough_for_the_tail() -> None:
    """A uniform of 53 zero bits is one of 2^53 values, from 12.1 standard deviations inwards, not one value."""
    stream = _Ending([0, 0, 0, 5 << 40], [0, 1, (1 << 53) - 1])
    values = _fine_uniforms(stream, scratch_for(4), out=np.empty(4))
    assert values.tolist() == pytest.approx([2.0**-107, 1.5 * 2.0**-106, 2.0**-53, 5 * 2.0**-13], rel=1e-12, abs=0)


def test_a_small_uniform_is_as_likely_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "_SMALL", 1 << 52)  # half of the values get more bits
    values = _fine_uniforms(Keystream.for_tests(3), scratch_for(200_000), out=np.empty(200_000))
    assert stats.kstest(values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("lag", [1, 2, LARGE // 2, noise_module._CHUNK // 2, noise_module._CHUNK])
def test_values_of_one_vector_are_independent(values: np.ndarray, lag: int) -> None:
    """The two values of a Box-Muller pair are half a chunk apart. Their magnitudes must be independent too."""
    one, other = values[:-lag], values[lag:]
    for left, right in ((one, other), (one**2, other**2), (abs(one), abs(other))):
        assert abs(np.corrcoef(left, right)[0, 1]) < 6 / len(one) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 511, 512, 513])
def test_odd_sizes_and_borders_between_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(noise_module, "_CHUNK", 256)
    many = np.stack([standard_normals(Keystream.for_tests(seed), size).numpy() for seed in range(400)])
    assert many.dtype == np.float64
    assert many.shape == (400, size)
    assert np.isfinite(many).all()
    assert (many.std(axis=0) > 0.75).all()  # every value is filled: unfilled memory would be constant or huge
    assert (many.std(axis=0) < 1.3).all()
    assert len(np.unique(many)) == many.size


@pytest.mark.parametrize("units", [0, 1 << 51, 3 << 51, (1 << 53) - 1])
def test_the_ends_of_the_unit_interval_are_finite(units: int) -> None:
    drawn = standard_normals(_Ending([units] * 2, [units] * 2, [units] * 2), 4).numpy()
    assert np.isfinite(drawn).all()
    assert abs(drawn).max() < 12.2


def test_steps_are_independent_and_the_type_is_float64() -> None:
    with GaussianNoise(20_000) as source:
        steps = torch.stack([source.take() for _ in range(6)])
    assert steps.dtype == torch.float64
    assert (torch.corrcoef(steps) - torch.eye(6)).abs().max() < 5 / 20_000**0.5
    assert len(steps.flatten().unique()) > 0.99 * steps.numel()


def test_a_step_keeps_its_values_when_the_next_is_made() -> None:
    with GaussianNoise(1000) as source:
        first = source.take()
        copy = first.clone()
        source.take()
        assert torch.equal(first, copy)


def test_the_key_alone_decides_and_the_thread_changes_nothing() -> None:
    stream = Keystream.for_tests(5)
    with GaussianNoise(1001, Keystream.for_tests(5)) as source:
        for _ in range(3):
            assert torch.equal(source.take(), standard_normals(stream, 1001))


def test_seeds_do_not_reach_it() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        with GaussianNoise(10) as source:
            drawn.append(source.take())
    assert not torch.equal(*drawn)


class _Ending(Keystream):
    """A stream that gives these integers, one list per call. Its parts are the stream itself."""

    def __init__(self, *lists: list[int]) -> None:
        super().__init__(bytes(32), secret=False)
        self._lists = iter(lists)

    def split(self, _count: int) -> Keystream:
        return self

    def integers(self, count: int, *, scratch: bytearray | None = None) -> np.ndarray:
        del scratch
        values = np.array(next(self._lists), dtype=np.int64)
        assert len(values) == count
        return values


class _Made:
    """Stands for `standard_normals`: tells of each call, and in which thread it was; fails after `good` calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, good: int = 1_000) -> None:
        self._good = good
        self.calls = threading.Semaphore(0)
        self.threads: list[str] = []
        monkeypatch.setattr(noise_module, "standard_normals", self)

    def __call__(self, keystream: Keystream, size: int) -> torch.Tensor:
        self.threads.append(threading.current_thread().name)
        self.calls.release()
        if len(self.threads) > self._good:
            raise OSError("no randomness left")
        return standard_normals(keystream, size)


def test_the_next_vector_is_made_in_the_background_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _Made(monkeypatch)
    with GaussianNoise(8) as source:
        for _ in range(3):
            assert made.calls.acquire(timeout=20), "one stretch per vector, made while this thread waits"
            source.take()
    assert all(name.startswith("dptune-noise") for name in made.threads)


@pytest.mark.parametrize(
    ("device", "stretches"),
    [("cpu", 2 * torch.get_num_threads()), ("meta", 12), ("cuda", 12)],
)
def test_an_accelerator_leaves_the_processor_time_to_make_more_of_a_whole_models_noise(
    monkeypatch: pytest.MonkeyPatch, device: str, stretches: int
) -> None:
    made = _Made(monkeypatch)
    monkeypatch.setattr(noise_module, "_ADAPTER", 500)
    monkeypatch.setattr(noise_module, "_STRETCH", 100)
    monkeypatch.setattr(noise_module, "_AHEAD", 1_200)
    with GaussianNoise(100 * 50, device=torch.device(device)) as source:
        for _ in range(stretches):
            assert made.calls.acquire(timeout=20)
        assert not made.calls.acquire(timeout=0.1), "no more memory than that"
        assert len(source.take()) == 5_000


def test_stretches_of_several_threads_share_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that two stretches use would give the same noise twice, also where their chunks are odd."""
    monkeypatch.setattr(noise_module, "_CHUNK", 101)
    monkeypatch.setattr(noise_module, "_SMALL", 1 << 53)  # every uniform takes as many words as it can
    monkeypatch.setattr(noise_module, "_STRETCH", 509)
    used: list[tuple[int, int]] = []

    class Noting(Keystream):
        def words(self, count: int, *, scratch: bytearray | None = None) -> np.ndarray:
            used.append((self._place, self._place + count))
            return super().words(count, scratch=scratch)

        def split(self, count: int) -> Keystream:
            part = Noting(self._key, secret=False, start=self._place)
            super().split(count)
            return part

    with GaussianNoise(2_000, Noting(bytes(32), secret=False)) as source:
        for _ in range(3):
            source.take()
    used.sort()
    assert len(used) > 3 * 3 * 20
    assert all(end <= start for (_, end), (start, _) in pairwise(used))


def test_an_error_in_the_thread_surfaces_and_no_old_noise_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _Made(monkeypatch, good=1)
    with GaussianNoise(8) as source:
        source.take()
        for _ in range(2):
            with pytest.raises(OSError, match="no randomness left"):
                source.take()


def test_a_keystream_that_fails_gives_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Keystream.from_os()
    with GaussianNoise(8, stream) as source:
        monkeypatch.setattr(stream, "_key", b"short")
        for _ in range(2):
            with pytest.raises(ValueError, match="key of 5 bytes"):
                source.take()


def test_closing_ends_the_thread_and_may_be_repeated() -> None:
    source = GaussianNoise(8)
    source.take()
    source.close()
    source.close()
    with pytest.raises(RuntimeError, match="closed"):
        source.take()


def test_the_source_says_whether_the_key_is_secret() -> None:
    with GaussianNoise(1) as secret, GaussianNoise(1, Keystream.for_tests(0)) as fixed:
        assert "operating system" in secret.source
        assert "FIXED key" in fixed.source


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"size={size}: "):
        GaussianNoise(size)


def test_a_vector_that_is_too_large_to_keep_ready_comes_in_parts_of_the_same_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(noise_module, "_CHUNK", 101)
    expected = Keystream.for_tests(9)
    wanted = [standard_normals(expected, size) for size in (1000, 1000, 500) * 2]
    monkeypatch.setattr(noise_module, "_STRETCH", 1000)
    with GaussianNoise(2500, Keystream.for_tests(9)) as source:
        for step in range(2):
            parts = list(source.parts())
            assert [len(part) for part in parts] == [1000, 1000, 500]
            for part, values in zip(parts, wanted[3 * step :], strict=False):
                assert torch.equal(part, values)


@pytest.mark.parametrize("std", [0.3, 20.0])
def test_a_noisy_sum_is_a_multiple_of_the_grid_next_to_sum_plus_noise(std: float) -> None:
    sums, grid = torch.linspace(-9, 9, 4001), grid_of(std)
    with GaussianNoise(4001, Keystream.for_tests(4)) as source, GaussianNoise(4001, Keystream.for_tests(4)) as same:
        exact = sums.double() + std * same.take()
        source.add_to(sums, std, grid=grid)
    multiples = sums.double() / grid
    assert torch.equal(multiples, multiples.round())
    assert (sums.double() - exact).abs().max() <= grid / 2
    assert sums.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 999, 1001])
def test_another_number_of_sums_than_of_noise_values_is_an_error(size: int) -> None:
    with GaussianNoise(1000) as source, pytest.raises(RuntimeError, match="1000 noise values for"):
        source.add_to(torch.zeros(size), 1.0, grid=2.0**-10)


def test_every_value_of_the_grid_is_as_likely_as_a_gaussian_says() -> None:
    """For a sum between two points of a coarse grid, so that a wrong rounding would show."""
    std, grid, n = 1.0, 0.25, 200_000
    sums = torch.full((n,), 0.1)
    with GaussianNoise(n, Keystream.for_tests(6)) as source:
        source.add_to(sums, std, grid=grid)
    points = np.arange(-12, 13)
    seen = np.array([(sums.numpy() / grid == point).sum() for point in points])
    expected = n * np.diff(stats.norm.cdf((np.append(points, 13) - 0.5) * grid, loc=float(np.float32(0.1))))
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_cannot_repeat_the_noise() -> None:
    source, stream = GaussianNoise(10), Keystream.from_os()

    def refused(draw: Callable[[], object]) -> bool:
        try:
            draw()
        except RuntimeError:
            return True
        return False

    child = os.fork()
    if child == 0:
        signal.alarm(5)  # without the check, the child waits for its parent's threads
        found = [refused(source.take), refused(lambda: stream.words(1)), refused(lambda: stream.split(1))]
        os._exit(0 if all(found) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert source.take().shape == (10,), "the parent goes on"
    source.close()
