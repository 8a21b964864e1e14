"""How far a model's losses give away secrets that were planted in its training rows.

A secret of a known form is compared with random candidates of the same form (Carlini et al. 2019, "The Secret
Sharer"). Its rank by loss says how many guesses an attacker would need. Exposure is log2(candidates) - log2(rank).
If the secret was drawn like the candidates and the model knows nothing of it, every rank is equally likely: so
rank / candidates is also the chance that an untrained secret ranks as high.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dptune._validate import refuse
from utils.files.cells import Place
from utils.files.tables import Row, read_rows

FLAG = "--secrets"
HOLE = "{}"
CHANCE_BITS = 1 / math.log(2)  # mean exposure of a secret that the model knows nothing of
_KEYS = ("secret", "alphabet", "candidates")
_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
_TRIES = 20  # draws for each candidate that is wanted


@dataclass(frozen=True)
class Secret:
    """A planted secret.

    Attributes:
        row: the row in which it was planted, with `{}` where it stands.
        secret: what stands there.
        candidates: others of the same form.
    """

    row: Row
    secret: str
    candidates: tuple[str, ...]

    def filled(self) -> list[Row]:
        """The row with the secret, then with each candidate."""
        return [fill(self.row, text) for text in (self.secret, *self.candidates)]


@dataclass(frozen=True)
class Exposure:
    """What a model gives away of a secret.

    Attributes:
        rank: of the secret by loss among itself and the candidates, from 1.
        candidates: how many they are, the secret among them.
    """

    rank: int
    candidates: int

    @property
    def bits(self) -> float:
        """log2(candidates) - log2(rank)."""
        return math.log2(self.candidates) - math.log2(self.rank)

    @property
    def chance(self) -> float:
        """The chance that a secret of which the model knows nothing ranks so high."""
        return self.rank / self.candidates


def exposure(losses: np.ndarray) -> Exposure:
    """The exposure of a secret, from the losses [1 + candidates] of it and of the candidates. Ties count against it.

    >>> exposure(np.array([2.0, 1.0, 3.0, 4.0])).bits
    1.0
    """
    return Exposure(int((losses[1:] <= losses[0]).sum()) + 1, len(losses))


def read_secrets(path: str, count: int, seed: int) -> list[Secret]:
    """The secrets of a file, each with at most `count` candidates.

    Each row is a training row in which `{}` stands for the secret, with a column `secret`. A column `candidates`
    (a list) names the candidates; else they are drawn (`random_candidates`), with the characters of a column
    `alphabet` if there is one.

    Raises:
        InvalidArgument: a row lacks a secret or a place for it, or has no other candidate. No secret is shown.
    """
    generator = np.random.default_rng(seed)
    found = []
    for number, row in enumerate(read_rows(Path(path), FLAG), start=1):
        found.append(_secret(row, Place(FLAG, path, number), count, generator))
    return found


def _secret(row: Row, place: Place, count: int, generator: np.random.Generator) -> Secret:
    secret, alphabet, given = (row.get(key) for key in _KEYS)
    text = {key: value for key, value in row.items() if key not in _KEYS and value is not None}
    if not isinstance(secret, str) or not secret:
        place.refuse("has no text in `secret`; give each row the secret that was planted")
    if HOLE not in json.dumps(text, ensure_ascii=False, default=str):
        place.refuse(f"has no {HOLE} where the secret stands; write the training row with {HOLE} in its place")
    if alphabet is not None and (not isinstance(alphabet, str) or len(set(alphabet)) < 2):
        place.refuse("`alphabet` needs at least two characters; give them as one text, or leave it out")
    if given is None:
        candidates = random_candidates(secret, count, generator, alphabet)
    elif isinstance(given, list) and all(isinstance(one, str) for one in given):
        candidates = list(dict.fromkeys(one for one in given if one != secret))[:count]
    else:
        place.refuse("`candidates` is no list of texts; give one, or leave it out")
    if not candidates:
        place.refuse("has no candidate besides the secret; give `alphabet` or `candidates`")
    return Secret(text, secret, tuple(candidates))


def random_candidates(
    secret: str, count: int, generator: np.random.Generator, alphabet: str | None = None
) -> list[str]:
    """At most `count` different texts of the secret's form, without the secret, equally likely.

    Digits become random digits, letters a to z random letters of the same case, and other characters stay. With an
    `alphabet`, every character becomes a random one of it. Fewer come back where the form has hardly more.
    """
    choices = [_like(character, alphabet) for character in secret]
    size = math.prod(map(len, choices))
    wanted = min(count, size - 1)
    found: dict[str, None] = {}
    for _ in range(_TRIES * (wanted + 1)):
        if len(found) == wanted:
            break
        drawn = "".join(one[generator.integers(len(one))] for one in choices)
        if drawn != secret:
            found.setdefault(drawn)
    return list(found)


def _like(character: str, alphabet: str | None) -> str:
    """The characters that may replace one."""
    if alphabet is not None:
        return "".join(dict.fromkeys(alphabet))
    return next((kind for kind in _KINDS if character in kind), character)


def fill(row: Row, text: str) -> Row:
    """The row with `text` instead of each `{}`, also inside lists and dictionaries."""
    return {key: _filled(value, text) for key, value in row.items()}


def _filled(value: object, text: str) -> object:
    if isinstance(value, str):
        return value.replace(HOLE, text)
    if isinstance(value, list):
        return [_filled(one, text) for one in value]
    if isinstance(value, dict):
        return {key: _filled(one, text) for key, one in value.items()}
    return value


def require_uncut(path: str, cut: Sequence[bool]) -> None:
    """Refuse a secret whose row was cut to the block size, because what was cut was not trained on.

    Args:
        path: the file of secrets.
        cut: whether the row of each secret was cut.
    """
    for number, is_cut in enumerate(cut, start=1):
        if is_cut:
            refuse(FLAG, path, f"row {number} is longer than the run's --block_size; shorten it, and plant it again")
