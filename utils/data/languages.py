"""Finds the language of a text: as named in the file, otherwise guessed by py3langid.

py3langid is small and maintained (BSD, 4 MB, 139 languages, no download, half a millisecond per text); fastText's
identifier needs a downloaded model. A guess depends on the text alone. For one or two words it is often wrong ("Hello"
gives Breton), so a language named in the file takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dptune._validate import refuse
from utils.files.cells import Place


def identify(text: str) -> str:
    """The most likely language, as an ISO 639 code.

    >>> identify("What is the capital of France, and who lives there?")
    'en'
    """
    import py3langid  # takes half a second

    code, _ = py3langid.classify(text)
    return str(code)


@dataclass(frozen=True)
class LanguageFilter:
    """Accepts texts in one language.

    Attributes:
        wanted: the language as the file names it (English), or, for rows that name none, a code of py3langid (en).
    """

    wanted: str

    def accepts(self, named: object, text: str, place: Place) -> bool:
        """Whether a text is in the language.

        Args:
            named: the language that the row names; None or blank if it names none.
            text: the text.
            place: where the row is.

        Raises:
            InvalidArgument: the row names no language, and `wanted` is not a code.
        """
        if isinstance(named, str) and named.strip():
            return named.strip().casefold() == self.wanted.casefold()
        if self.wanted not in _codes():
            where = f"row {place.row} of {place.path}"
            refuse(
                "--language",
                self.wanted,
                f"{where} names no language, so the language is guessed; give a code such as en",
            )
        return identify(text) == self.wanted


@cache
def _codes() -> frozenset[str]:
    """All codes of py3langid."""
    import py3langid

    return frozenset(str(code) for code, _ in py3langid.rank("any text ranks all of them"))
