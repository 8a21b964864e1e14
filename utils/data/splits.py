"""Splits rows into training, validation and test by hashes, so that no row affects the side of another.

With a split by position or by one stream of random numbers, adding or removing a row would move the rows after it.
The training sets of two files that differ by one unit would then differ by many, and epsilon would not hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dptune._validate import refuse
from utils.data.conversations import normalised
from utils.data.record import Record
from utils.files.tables import Row

SPLIT_NAMES = ("train", "val", "test")
LABELLED = "labelled"  # prefix in the names of data sets of pairs


@dataclass(frozen=True)
class Shares:
    """Average shares of the instructions (or users) for validation and test; the others train.

    Raises:
        InvalidArgument: a share is not between 0 and 1, or nothing is left for training.
    """

    val: float
    test: float

    def __post_init__(self) -> None:
        for name in ("val", "test"):
            value = getattr(self, name)
            if not 0 < value < 1:
                refuse(f"--{name}_share", value, "give a number above 0 and below 1")
        if self.val + self.test >= 1:
            refuse("--val_share", self.val, f"leaves nothing for training with --test_share {self.test}; give less")

    def side_of(self, key: str, seed: int) -> str:
        """One of SPLIT_NAMES for a text or a user."""
        digest = hashlib.sha256(f"split\n{seed}\n{key}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return "val" if place < self.val else "test" if place < self.val + self.test else "train"


def split_rows(rows: Iterable[Row], shares: Shares, seed: int) -> dict[str, list[Row]]:
    """The rows of each side, in order; no row is left out.

    All rows of one user go to one side, and so do all rows of one instruction that have no user.

    Args:
        rows: each has an `instruction`, and `user` (text or None) if users are known.
        shares: the shares of validation and test.
        seed: another seed gives another split; it need not be secret.
    """
    sides: dict[str, list[Row]] = {name: [] for name in SPLIT_NAMES}
    for row in rows:
        user = row.get("user")
        key = f"instruction\n{normalised(str(row['instruction']))}" if user is None else f"user\n{user}"
        sides[shares.side_of(key, seed)].append(row)
    return sides


def hold_out(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records): all records of an author, or of one text, go to the same side.

    A hash of the author's name, or of the text if there is none, decides the side. It does not depend on other rows, as
    adding or removing one must not move another (see `dptune.units.unit.bound_authors`).

    Args:
        records: the records to split.
        share: average share of authors or texts to hold out, in [0, 1).
        seed: another seed holds out others; it need not be secret.
    """
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        key = f"author\n{record.author}" if record.author is not None else f"text\n{record.text}"
        digest = hashlib.sha256(f"held out\n{seed}\n{key}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < share * 2**64].append(record)
    return sides
