"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may contact a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.tiny import save_tiny

settings.register_profile("no deadline", deadline=None)  # a busy machine may stop for longer than Hypothesis allows
settings.load_profile("no deadline")


def pytest_collection_finish() -> None:
    """Leave out what the imports made from every later collection of garbage: transformers' Trainer collects each time
    that it begins or ends, which took a quarter of its tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are empty files: drawing them takes longer than a tiny run. Use it where a test looks at none of them."""

    def touch(path: Path, *_: object, **__: object) -> bool:
        path.touch()
        return True

    monkeypatch.setattr("dptune.report.publish._plot_curve", touch)
    monkeypatch.setattr("utils.training.outputs.plot_diagnostics", touch)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny_llama"))
