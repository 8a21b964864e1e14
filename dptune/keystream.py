"""Random bits from a cryptographic generator: AES-256 in counter mode, keyed from the operating system.

Noise and sampling that an attacker can predict give no privacy, so neither `torch.manual_seed` nor a program's seed has
an effect here. A general-purpose generator (Mersenne twister, Philox) is predictable from its outputs; a keystream is
not.
"""

from __future__ import annotations

import hashlib
import os
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

KEY_BYTES = 32
BITS = 53  # random bits of a uniform
_LOW_BITS = (1 << BITS) - 1
SECRET, FIXED = "secret", "fixed"  # kinds of keys, in words for the ledger
_SLACK = 15  # extra bytes that the cipher needs behind its output
_ZEROS = bytes(1 << 19)  # what the cipher encrypts, so that its output is the keystream itself


class Keystream:
    """An endless stream of random 64-bit words under one key. Not safe to share between threads.

    A secret stream works only in the process that made it: after a fork, parent and child would draw the same words.

    Make one with `from_os` (the default everywhere) or `shared` (for ranks that must agree on one secret draw).
    `for_tests` is reproducible: a run that uses it has no guarantee, and its report says so.
    """

    def __init__(self, key: bytes, *, secret: bool, start: int = 0) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"key of {len(key)} bytes: give {KEY_BYTES}")
        self.secret = secret
        # The counter starts at zero: one key makes one stream, and a key is never used for two purposes.
        self._key, self._place = key, start  # the position of the next word
        self._process = os.getpid()
        self._cipher = _cipher_at(key, start)

    @property
    def kind(self) -> str:
        """The kind of key, in words for the ledger."""
        return SECRET if self.secret else FIXED

    @classmethod
    def from_os(cls) -> Keystream:
        """A stream under a new key from the operating system."""
        return cls(new_key(), secret=True)

    @classmethod
    def shared(cls, key: bytes) -> Keystream:
        """A stream under a `new_key()` that only the ranks of one job know."""
        return cls(key, secret=True)

    @classmethod
    def for_tests(cls, seed: int | str) -> Keystream:
        """A reproducible stream for `seed`. For tests only: it protects nobody."""
        return cls(hashlib.sha256(f"dptune test {seed}".encode()).digest(), secret=False)

    def split(self, count: int) -> Keystream:
        """A stream of the next `count` words for another thread; this stream then skips them."""
        self.require_own_process()
        part = Keystream(self._key, secret=self.secret, start=self._place)
        self._place += count
        self._cipher = _cipher_at(self._key, self._place)
        return part

    def words(self, count: int, *, scratch: bytearray | None = None) -> np.ndarray:
        """`count` uniform uint64 words.

        Args:
            scratch: memory that the words are written to, from `scratch_for` at least as many words.

        Raises:
            RuntimeError: the stream is secret and another process made it.
        """
        self.require_own_process()
        buffer = scratch_for(count) if scratch is None else scratch
        zeros = memoryview(_ZEROS)[: 8 * count] if 8 * count <= len(_ZEROS) else bytes(8 * count)
        self._cipher.update_into(zeros, buffer)
        self._place += count
        return np.frombuffer(buffer, dtype=np.uint64, count=count)

    def uniforms(self, count: int) -> np.ndarray:
        """`count` float64 values, uniform on the multiples of 2^-53 in [0, 1)."""
        values = self.integers(count).astype(np.float64)
        values *= 2.0**-BITS
        return values

    def integers(self, count: int, *, scratch: bytearray | None = None) -> np.ndarray:
        """`count` uniform int64 values in [0, 2^53), written to `scratch` if it is given (see `words`)."""
        words = self.words(count, scratch=scratch).view(np.int64)
        words &= _LOW_BITS
        return words

    def require_own_process(self) -> None:
        """Raise `RuntimeError` if the stream is secret and another process made it, which draws the same words."""
        if self.secret and os.getpid() != self._process:
            raise RuntimeError("this keystream is another process's, and would repeat its randomness: make a new one")


def _cipher_at(key: bytes, word: int) -> CipherContext:
    """AES-256-CTR positioned before word `word` of its stream; a block has two words."""
    block, odd = divmod(word, 2)
    cipher = Cipher(algorithms.AES(key), modes.CTR(block.to_bytes(16, "big"))).encryptor()
    cipher.update(bytes(8 * odd))
    return cipher


def scratch_for(count: int) -> bytearray:
    """Memory for `count` words, which a caller can use again for the next ones."""
    return bytearray(8 * count + _SLACK)


def new_key() -> bytes:
    """A new secret key of `KEY_BYTES` bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)
