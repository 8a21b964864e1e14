"""Address and key of an OpenAI-compatible endpoint. The key comes from the environment and is never shown."""

from __future__ import annotations

import os
from urllib.parse import SplitResult, urlsplit

from dptune._validate import HIDDEN, InvalidArgument, refuse

OPENAI_KEY, VLLM_KEY = "OPENAI_API_KEY", "VLLM_API_KEY"  # environment variables; no service gets the key of another


def require_address(url: str, *, flag: str, key_variable: str) -> None:
    """Refuse an invalid address, and one that holds a password or a key, since addresses are printed.

    Args:
        url: the address without the route, such as http://127.0.0.1:8000/v1.
        flag: the flag that gave it.
        key_variable: the environment variable that holds the key.

    Raises:
        InvalidArgument: the address is refused. The message does not show what might be a key.
    """
    parts = _split(url, flag)
    if "@" in parts.netloc or parts.query or parts.fragment:
        remedy = f"give scheme, host and path only; put the key into the environment variable {key_variable}"
        refuse(flag, HIDDEN, remedy)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        refuse(flag, url, "give an address such as http://127.0.0.1:8000/v1")


def key_from_environment(variable: str) -> str | None:
    """The key in an environment variable; None if it is not set, since a local server needs no key.

    Raises:
        InvalidArgument: the key cannot be in an HTTP header. The message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        refuse(variable, HIDDEN, "holds a character that no key can have; set the variable again")
    return key or None


def _split(url: str, flag: str) -> SplitResult:
    """The parts of an address; checks its port."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InvalidArgument(flag, HIDDEN, "not an address; give one such as http://127.0.0.1:8000/v1") from None
    return parts
