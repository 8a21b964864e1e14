"""Older names of fields: as flags, as keywords, and as attributes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from dptune._aliases import aliases, canonical, names_of, spellings, spellings_of, with_older_keywords
from dptune._validate import InvalidArgument


@with_older_keywords
@dataclass
class Settings:
    """One field with older names, one without."""

    clip_norm: float = field(default=1.0, metadata={"aliases": aliases("max_norm", "clip")})
    rate: float = 0.5


def test_a_name_without_underscores_has_one_spelling() -> None:
    assert spellings("top") == ["--top"]
    assert spellings("top_p") == ["--top_p", "--top-p"]


def test_all_names_of_a_field_are_known() -> None:
    clip_norm, rate = fields(Settings)
    assert names_of(clip_norm) == ["clip_norm", "max_norm", "clip"]
    assert spellings_of(clip_norm) == ["--clip_norm", "--clip-norm", "--max_norm", "--max-norm", "--clip"]
    assert spellings_of(rate) == ["--rate"]
    assert canonical([Settings]) == {"clip_norm": "clip_norm", "max_norm": "clip_norm", "clip": "clip_norm"} | {
        "rate": "rate"
    }


@pytest.mark.parametrize("old", ["max_norm", "clip"])
def test_an_older_keyword_sets_the_field(old: str) -> None:
    given: dict[str, Any] = {old: 3.0}
    made = Settings(**given)
    assert made == Settings(clip_norm=3.0) == Settings(3.0)
    assert getattr(made, old) == 3.0
    setattr(made, old, 4.0)
    assert made.clip_norm == 4.0
    assert replace(made, clip_norm=5.0) == Settings(5.0)


def test_two_names_of_one_field_are_refused() -> None:
    for given in ({"clip_norm": 1.0, "clip": 2.0}, {"max_norm": 1.0, "clip": 2.0}):
        with pytest.raises(InvalidArgument, match=r"^clip=2\.0: is another name of clip_norm, which is also given"):
            Settings(**given)
