"""A language named in the file takes precedence over a guess."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.data.languages import LanguageFilter, identify
from utils.files.cells import Place

PLACE = Place("--input_file", "chats.jsonl", 7)
TEXTS = {
    "en": "Please write a short letter to my landlord about the broken heating.",
    "de": "Bitte schreibe einen kurzen Brief an meinen Vermieter über die kaputte Heizung.",
    "es": "Escribe una carta breve a mi casero sobre la calefacción que no funciona.",
    "zh": "请给我的房东写一封关于暖气坏了的短信。",
    "ru": "Напиши короткое письмо моему домовладельцу о сломанном отоплении.",
}


@pytest.mark.parametrize("code", TEXTS)
def test_sentences_are_identified(code: str) -> None:
    assert identify(TEXTS[code]) == code


@pytest.mark.parametrize("code", TEXTS)
def test_rows_without_a_named_language_are_identified(code: str) -> None:
    kept = [other for other, text in TEXTS.items() if LanguageFilter(code).accepts(None, text, PLACE)]
    assert kept == [code]


def test_a_language_named_in_the_file_takes_precedence() -> None:
    assert LanguageFilter("english").accepts(" English", TEXTS["de"], PLACE)
    assert not LanguageFilter("English").accepts("German", TEXTS["en"], PLACE)


@pytest.mark.parametrize("named", [None, "", " ", 7])
def test_without_a_named_language_the_flag_must_be_a_code(named: object) -> None:
    with pytest.raises(InvalidArgument, match=r"--language='English': row 7 of chats\.jsonl names no language"):
        LanguageFilter("English").accepts(named, TEXTS["en"], PLACE)
