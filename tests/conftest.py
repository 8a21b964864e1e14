"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may contact a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny_llama"))
