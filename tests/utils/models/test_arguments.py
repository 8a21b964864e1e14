"""Which model is loaded: the key comes from the environment, is never printed, and goes to the hub."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from utils.models.arguments import ModelArguments

TOKEN = "hf_abcdefghijklmnop"


@pytest.mark.parametrize(("given", "known"), [(None, "of the environment"), (TOKEN, TOKEN), ("", "of the environment")])
def test_the_flag_is_before_the_environment(given: str | None, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of the environment")
    arguments = ModelArguments("m", revision="v1", access_token=given)
    assert arguments.hub == {"token": known, "revision": "v1"}


def test_an_empty_environment_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert ModelArguments("m").hub == {"token": None, "revision": None}


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(ModelArguments("m", access_token=TOKEN))


def test_bits_that_need_a_missing_library_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bits: int) -> None:
        raise InvalidArgument("--qbits", bits, "pip install bitsandbytes")

    monkeypatch.setattr("utils.models.arguments.require_available", refuse)
    with pytest.raises(InvalidArgument, match=r"^--qbits=4: pip install bitsandbytes"):
        ModelArguments("m", qbits=4)
