"""What the user says in a card has the form that model hubs read."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from dptune.report.fields import CardFields


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"base_model": "/home/ann/llama"}, "base_model='/home/ann/llama'"),
        ({"base_model": "a/b/c"}, "base_model"),
        ({"license": "Apache 2.0"}, "license='Apache 2.0'"),
        ({"license": ""}, "license"),
        ({"languages": ("en", "English")}, "languages='English'"),
    ],
)
def test_another_form_is_refused_by_name(given: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{named}.*give "):
        CardFields(**given)


def test_what_hubs_read_is_taken() -> None:
    card = CardFields("meta-llama/Llama-3.2-1B", "llama3.2", ("en", "gsw", "multilingual"), ("any words",))
    assert (card.base_model, card.license, card.data) == ("meta-llama/Llama-3.2-1B", "llama3.2", ("any words",))
    assert card.languages == ("en", "gsw", "multilingual")
    assert CardFields("gpt2").base_model == "gpt2"
