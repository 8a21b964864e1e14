"""A fault: one change that no user would notice, and the tests that must go red with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One change that no user would notice.

    Attributes:
        name: what is broken.
        file: where, below the root.
        old: text that occurs once in it.
        new: what replaces it.
        tests: files, or single tests, at least one of which must fail. Quick ones keep `make mutants` quick.
        why: what the fault would cost.
        and_also: another pair of `old` and `new`, where one place is not enough.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    and_also: tuple[str, str] | None = None

    @property
    def changes(self) -> list[tuple[str, str]]:
        """(old, new) of each place."""
        return [(self.old, self.new), *([self.and_also] if self.and_also else [])]

    def applied(self, source: str) -> str:
        """`source`, the text of `file`, with the fault. Raises `ValueError` if a text is not there exactly once."""
        for old, new in self.changes:
            if (count := source.count(old)) != 1:
                raise ValueError(f"{self.name}: {old!r} occurs {count} times in {self.file}; it must be there once")
            source = source.replace(old, new)
        return source


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """A copy of the tree with the fault, until the block ends."""
    path = tree / fault.file
    sound = path.read_text()
    try:
        _write(path, fault.applied(sound))
        yield
    finally:
        _write(path, sound)


def _write(path: Path, source: str) -> None:
    """Write a module and drop its bytecode: two versions of one size, written in one second, look alike to Python."""
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()
