"""Fixtures of the tests of a planned classifier: a tiny BERT, an easy task, and a plan of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.classifier_folders import NO_DROPOUT, save_bert, write_sst2
from tests.classifier_settings import PRIVATE, flags, settings
from utils.classification.data import load_tasks
from utils.classification.files import load_classifier_tokenizer
from utils.classification.plan import PlannedTask, plan_task
from utils.cli.launch import make_accelerator


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), **NO_DROPOUT)


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def planned(bert: Path, glue: Path, tmp_path: Path) -> Any:
    """Plans the one task of a line: (plan, tokenizer, accelerator)."""

    def make(**changes: object) -> tuple[PlannedTask, Any, Any]:
        given = settings(*flags(bert, glue, tmp_path / "out", **PRIVATE | changes), datasets=())
        tokenizer, accelerator = load_classifier_tokenizer(str(bert)), make_accelerator()
        (task,) = load_tasks(given, tokenizer)
        return plan_task(task, given, tokenizer, accelerator), tokenizer, accelerator

    return make
