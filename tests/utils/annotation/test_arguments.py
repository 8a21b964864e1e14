"""Flags of annotating: what is out of range, and an address that holds a key, are refused; what a request says."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.annotation.arguments import EndpointArguments
from utils.cli.flags import parse

KEY = "sk-0815-not-to-be-seen"
NEEDED = ["--base_url", "http://127.0.0.1:8000/v1", "--model", "m"]


def endpoint(*flags: str) -> EndpointArguments:
    (found,) = parse(EndpointArguments, args=[*NEEDED, *flags])
    return found


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"https://me:{KEY}@example.org/v1", "give scheme, host and path only"),
        (f"https://example.org/v1?key={KEY}", "give scheme, host and path only"),
        (f"https://[{KEY}", "not an address"),
        ("example.org/v1", "give an address such as"),
        ("ftp://example.org", "give an address such as"),
        ("http://example.org:http/v1", "not an address"),
    ],
)
def test_an_address_is_checked_and_no_key_in_it_is_shown(url: str, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told) as caught:
        endpoint("--base_url", url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--max_concurrency", "0"),
        ("--max_tokens", "0"),
        ("--max_retries", "-1"),
        ("--timeout", "0"),
        ("--timeout", "inf"),
        ("--temperature", "-1"),
        ("--price_per_million_input", "nan"),
        ("--model", " "),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        endpoint(name, value)


def test_answers_follow_from_the_request_and_the_system_prompt_not_from_the_address() -> None:
    asked = endpoint("--max_tokens", "7", "--token_limit_field", "max_completion_tokens", "--system_prompt", "Brief.")
    assert asked.request == {"model": "m", "max_completion_tokens": 7}
    assert asked.settings == {**asked.request, "system_prompt": "Brief."}
    assert endpoint("--temperature", "0").request == {"model": "m", "max_tokens": 1024, "temperature": 0.0}
    assert endpoint("--base_url", "http://10.0.0.1:9/v1").settings == endpoint().settings
    assert asked.host == "127.0.0.1:8000"
