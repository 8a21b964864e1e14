"""A model in which rows reach each other, as a stand-in for one that no private run may train."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn


def couple_rows(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], *, width: int, output: str = "last_hidden_state"
) -> None:
    """Add the mean over the micro-batch to each row's `output` wherever rows have at least `width` tokens."""
    forward = kind.forward

    def coupled(self: Any, *args: Any, **how: Any) -> Any:
        outputs = forward(self, *args, **how)
        if outputs.last_hidden_state.shape[1] >= width:
            own = getattr(outputs, output)
            setattr(outputs, output, own + own.mean(0, keepdim=True))
        return outputs

    monkeypatch.setattr(kind, "forward", coupled)
