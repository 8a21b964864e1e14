"""Which rows train, which validate and which test: by hashes, so that no row decides over another's side.

A side chosen by position or by one stream of random numbers would move the rows behind one that is added or taken out,
and the data set that a stated epsilon speaks of would not be the neighbour of its neighbour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dptune._validate import refuse
from utils.data.conversations import normalised
from utils.data.records import Record
from utils.files.tables import Row

SPLIT_NAMES = ("train", "val", "test")
LABELLED = "labelled"  # how the name of a data set of pairs begins


@dataclass(frozen=True)
class Shares:
    """Of the instructions (or users) that validate and test, in expectation; the others train.

    Raises:
        InvalidArgument: a share is not above 0, or nothing is left to train on.
    """

    val: float
    test: float

    def __post_init__(self) -> None:
        for name in ("val", "test"):
            value = getattr(self, name)
            if not 0 < value < 1:
                refuse(f"--{name}_share", value, "give a number above 0 and below 1")
        if self.val + self.test >= 1:
            refuse("--val_share", self.val, f"leaves nothing to train on beside --test_share {self.test}; give less")

    def side_of(self, key: str, seed: int) -> str:
        """One of SPLIT_NAMES for a text or a user."""
        digest = hashlib.sha256(f"split\n{seed}\n{key}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return "val" if place < self.val else "test" if place < self.val + self.test else "train"


def split_rows(rows: Iterable[Row], shares: Shares, seed: int) -> dict[str, list[Row]]:
    """The rows of each side, in their order; nothing is left out.

    All rows of one user go to one side, and so do all rows of one instruction that have no user.

    Args:
        rows: with an `instruction`, and with `user` (a text or None) where users are known.
        shares: of the sides.
        seed: another one splits otherwise; need not be secret.
    """
    sides: dict[str, list[Row]] = {name: [] for name in SPLIT_NAMES}
    for row in rows:
        user = row.get("user")
        key = f"instruction\n{normalised(str(row['instruction']))}" if user is None else f"user\n{user}"
        sides[shares.side_of(key, seed)].append(row)
    return sides


def hold_out(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(what is trained on, what is held out): all records of an author, or of one text, go to the same side.

    Each side is decided by a hash of the author's name, or of the text where there is none: on nobody else's rows, as
    adding or removing one must not move another (see `dptune.units.unit.bound_authors`).

    Args:
        records: to be split.
        share: of authors or texts that are held out, in expectation, in [0, 1).
        seed: another one holds out others; need not be secret.
    """
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        key = f"author\n{record.author}" if record.author is not None else f"text\n{record.text}"
        digest = hashlib.sha256(f"held out\n{seed}\n{key}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < share * 2**64].append(record)
    return sides
