"""What is known of a job's model without its weights."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from utils.training.causal_lm import skeleton
from utils.training.causal_lm.skeleton import recomputes


def test_activations_are_recomputed_where_flag_or_launch_asks(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recomputes(job(gradient_ckpt=True).groups)
    plain = job().groups
    assert not recomputes(plain)
    monkeypatch.setattr(skeleton, "sharding_of_launch", lambda: type("Sharding", (), {"checkpoint_activations": True}))
    assert recomputes(plain)


def test_an_optimizer_that_cannot_work_here_is_refused_before_the_data_are_read(job: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^--optimizer='paged-adamw-8bit': its pages are for a GPU"):
        job(optimizer="paged-adamw-8bit")
