"""Flags of the model: what is refused."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from tests.classifier_settings import settings


def test_a_text_has_at_least_two_tokens() -> None:
    with pytest.raises(InvalidArgument, match="--block_size=1: give a whole number of at least 2"):
        settings("--block_size", "1")
