"""What the tests of a job of train_clm.py share."""

from __future__ import annotations

import pytest
import torch

from utils.training import target

WITHOUT_PRIVACY = {"clip_norm": -1, "noise_multiplier": -1}


def in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as a launch with fp16 does on a GPU."""
    monkeypatch.setattr(target, "compute_dtype", lambda *_: torch.float16)
