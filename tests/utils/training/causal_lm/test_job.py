"""A planned job, as one value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.utils.training.causal_lm.jobs import in_float16
from utils.cli.launch import loss_scale
from utils.training.causal_lm.job import with_clip_norm


def test_a_clip_norm_that_was_open_is_the_only_flag_that_changes(job: Any) -> None:
    groups = job(clip_norm="auto").groups
    closed = with_clip_norm(groups, 0.25)
    assert (groups.privacy.clip_norm_is_open, closed.privacy.clip_norm_is_open) == (True, False)
    assert closed == groups._replace(privacy=replace(groups.privacy, clip_norm=0.25))


def test_losses_are_scaled_for_what_is_trained_in_float16(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = job()
    assert (planned.whole, planned.loss_scale) == (False, 1.0)
    in_float16(monkeypatch)
    planned = job(trainable="all", lora_r=None)
    assert (planned.dtype, planned.whole) == (torch.float16, True)
    assert planned.loss_scale == loss_scale(torch.float16, whole=True) != loss_scale(torch.float16)
