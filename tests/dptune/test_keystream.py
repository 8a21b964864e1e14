"""The keystream: uniform, unpredictable, and one stream per key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from dptune import Keystream
from dptune.keystream import KEY_BYTES, new_key


def test_the_stream_is_aes_256_in_counter_mode_from_zero() -> None:
    key = bytes(range(KEY_BYTES))
    expected = b""
    for counter in range(4):  # counter mode by hand: one block of AES per counter value
        block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counter.to_bytes(16, "big"))
        expected += block
    assert Keystream.shared(key).words(8).tobytes() == expected


def test_what_is_taken_in_pieces_is_what_is_taken_at_once_and_never_repeats() -> None:
    one, other = Keystream.for_tests(1), Keystream.for_tests(1)
    pieces = np.concatenate([one.words(count) for count in (1, 3, 0, 1000, 7)])
    assert np.array_equal(pieces, other.words(1011))
    assert len(np.unique(pieces)) == len(pieces)


def test_uniforms_are_uniform_on_the_half_open_unit_interval() -> None:
    values = Keystream.for_tests(2).uniforms(200_000)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-6
    assert np.array_equal(values * 2**53, np.floor(values * 2**53))
    assert len(np.unique(values)) == len(values)
    low_bits = (values * 2**53).astype(np.int64) & 1  # all 53 bits are random, even the lowest
    assert abs(low_bits.mean() - 0.5) < 5 * 0.5 / len(values) ** 0.5


def test_neighbouring_values_are_independent() -> None:
    values = Keystream.for_tests(3).uniforms(200_000)
    for lag in (1, 2, 3):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / len(values) ** 0.5


def test_streams_from_the_operating_system_differ_whatever_the_seeds() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        stream = Keystream.from_os()
        assert stream.secret
        drawn.append(stream.words(4).tobytes())
    assert drawn[0] != drawn[1]
    assert new_key() != new_key()
    assert len(new_key()) == KEY_BYTES


def test_a_shared_key_gives_one_secret_stream_and_a_test_stream_is_no_secret() -> None:
    key = new_key()
    one, other = Keystream.shared(key), Keystream.shared(key)
    assert one.secret
    assert np.array_equal(one.words(5), other.words(5))
    assert not Keystream.for_tests(0).secret
    assert not np.array_equal(Keystream.for_tests(0).words(5), Keystream.for_tests(1).words(5))


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"key of {length} bytes: give 32"):
        Keystream.shared(bytes(length))


@pytest.mark.parametrize("before", [0, 1, 2, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_a_split_stream_has_the_next_words_and_the_other_goes_on_behind_them(before: int, count: int) -> None:
    one, other = Keystream.for_tests(1), Keystream.for_tests(1)
    expected = other.words(before + count + 10)
    one.words(before)
    part = one.split(count)
    assert np.array_equal(one.words(10), expected[before + count :])  # in either order of reading
    assert np.array_equal(part.words(count), expected[before : before + count])
    assert part.secret == one.secret
