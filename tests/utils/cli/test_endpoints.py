"""Addresses and keys of endpoints: an invalid address is refused, and a possible key is never shown."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.cli.endpoints import key_from_environment, require_address

SECRET = "sk-very-secret"


def is_taken(url: str) -> bool:
    try:
        require_address(url, flag="--base_url", key_variable="OPENAI_API_KEY")
    except InvalidArgument:
        return False
    return True


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "https://example.org", "http://[::1]:80/v1"])
def test_addresses_are_taken(url: str) -> None:
    assert is_taken(url)


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://example.org", "http://", "", "http:///v1"])
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--base_url=.*give an address such as") as caught:
        require_address(url, flag="--base_url", key_variable="OPENAI_API_KEY")
    assert caught.value.value == url


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@example.org/v1",
        f"https://example.org/v1?key={SECRET}",
        f"https://example.org/v1#{SECRET}",
        f"http://{SECRET}:port/v1",
        f"http://[{SECRET}/v1",
    ],
)
def test_an_address_that_may_hold_a_key_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        require_address(url, flag="--base_url", key_variable="OPENAI_API_KEY")
    assert str(caught.value).startswith("--base_url: ")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("value", "key"), [(None, None), ("", None), ("  ", None), (f" {SECRET}\n", SECRET)])
def test_the_key_comes_from_the_environment(
    value: str | None, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    assert key_from_environment("A_KEY") == key


@pytest.mark.parametrize("odd", ["\x01", "\u00e9", "\n"])
def test_a_key_that_no_header_may_hold_is_refused_without_showing_it(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", f"{SECRET}{odd}more")
    with pytest.raises(InvalidArgument, match=r"^A_KEY: ") as caught:
        key_from_environment("A_KEY")
    assert SECRET not in str(caught.value)
