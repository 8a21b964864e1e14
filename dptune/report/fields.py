"""What a model card says besides the guarantee. No torch in this file, because flags are checked with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dptune._validate import refuse

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model; that of a data set has an owner
_FORMS = {
    "base_model": HUB_NAME,
    "license": re.compile(r"[a-z0-9][a-z0-9.-]*"),
    "languages": re.compile(r"[a-z]{2,3}|multilingual|code"),
}
_REMEDIES = {
    "base_model": "give a name on the hub, such as meta-llama/Llama-3.2-1B",
    "license": "give the identifier of a licence, as model hubs spell it, such as apache-2.0",
    "languages": "give the ISO code of a language, such as en, or multilingual",
}


@dataclass(frozen=True)
class CardFields:
    """What the user says about a model. A field without a value is marked in the card as one to fill in.

    Attributes:
        base_model: name of the base model on the hub, if it was loaded from a folder.
        license: identifier of the licence, as model hubs spell it: "apache-2.0".
        languages: ISO codes of the languages of the texts: ("en",).
        data: names of the training data, as they may be published.
        recipe: the command line that repeats the run, without private names (see `dptune.report.recipe`).

    Raises:
        InvalidArgument: a name, a licence or a language has another form.
    """

    base_model: str | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    recipe: str | None = None

    def __post_init__(self) -> None:
        given = {"base_model": [self.base_model], "license": [self.license], "languages": self.languages}
        for name, words in given.items():
            for word in words:
                if word is not None and not _FORMS[name].fullmatch(word):
                    refuse(name, word, _REMEDIES[name])


NO_FIELDS = CardFields()
