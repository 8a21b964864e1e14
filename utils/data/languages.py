"""Which language a text is in: the file's own word where it has one, otherwise py3langid's guess.

py3langid (BSD, 4 MB, 139 languages, no download, half a millisecond a text) is small and kept up; fastText's own
identifier needs a model file from a web site. A guess follows from the text alone. On a word or two it is often wrong
("Hello" comes out as Breton), so where the file names languages its word counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dptune._validate import refuse
from utils.files.cells import Place


def identify(text: str) -> str:
    """The likeliest language, as an ISO 639 code.

    >>> identify("What is the capital of France, and who lives there?")
    'en'
    """
    import py3langid  # takes half a second

    code, _ = py3langid.classify(text)
    return str(code)


@dataclass(frozen=True)
class LanguageFilter:
    """What is in one language.

    Attributes:
        wanted: as the file names it (English) or, for rows that name none, a code that py3langid knows (en).
    """

    wanted: str

    def accepts(self, named: object, text: str, place: Place) -> bool:
        """Whether a text is in the language.

        Args:
            named: the row's own word for its language; None or blank where it has none.
            text: the text.
            place: where the row stands.

        Raises:
            InvalidArgument: the row names no language, and `wanted` is no code.
        """
        if isinstance(named, str) and named.strip():
            return named.strip().casefold() == self.wanted.casefold()
        if self.wanted not in _codes():
            where = f"row {place.row} of {place.path}"
            refuse("--language", self.wanted, f"{where} names no language, and to identify it takes a code such as en")
        return identify(text) == self.wanted


@cache
def _codes() -> frozenset[str]:
    """All that py3langid knows."""
    import py3langid

    return frozenset(str(code) for code, _ in py3langid.rank("any text ranks all of them"))
