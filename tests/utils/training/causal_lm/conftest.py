"""Plans jobs of train_clm.py on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.scripts.test_train_clm import flags
from utils.cli.flags import parse
from utils.cli.launch import make_accelerator
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups
from utils.training.causal_lm.job import CausalLMJob
from utils.training.causal_lm.plan import plan_job
from utils.training.run import open_folder


@pytest.fixture
def job(tiny_model_dir: Path, tmp_path: Path) -> Any:
    """Plans a job in `tmp_path/out`, with flags changed."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "Say a word.", "answer": "word end"}\n' * 40)

    def make(**changes: object) -> CausalLMJob:
        groups = Groups(*parse(*CAUSAL_LM_GROUPS, args=flags(tiny_model_dir, data, tmp_path / "out", **changes)))
        with open_folder(groups.output, make_accelerator()) as folder:
            return plan_job(groups, folder)

    return make
