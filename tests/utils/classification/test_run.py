"""The run of a task: neighbours are checked before a private step, and launches that do not fit are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertModel

from dptune import InvalidArgument
from dptune.averaging import NO_AVERAGE, Averaging
from tests.coupled_rows import couple_rows
from utils.classification import run as module
from utils.classification.classifier_task import identity_of
from utils.classification.model import load_in_mode
from utils.classification.run import describe_short_clip_norm, dtype_of_launch, load_trained, run_task
from utils.training.loop import End, Pace


@pytest.mark.parametrize(("private", "rows"), [(True, 1), (True, 4), (False, 4)])
def test_rows_that_reach_each_other_are_refused_before_a_private_run(
    private: bool, rows: int, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they do so only if a row has --block_size tokens, and where a step takes one such row at a time."""
    couple_rows(monkeypatch, BertModel, width=16, output="pooler_output")
    setup = planned(micro_batch_size=rows, **({} if private else {"enable_dp": None, "noise_multiplier": None}))
    if not private:
        assert load_trained(*setup).model is not None
        return
    with pytest.raises(InvalidArgument, match="per-example gradients differ from autograd's"):
        load_trained(*setup)


def test_an_average_reaches_the_run_and_what_a_resumed_run_shares(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[Pace] = []
    monkeypatch.setattr(module, "train", lambda *given: paces.append(given[4]) or End(1, None))
    for averaging, flag in ((NO_AVERAGE, {}), (Averaging(ema=0.9), {"ema": 0.9})):
        one, tokenizer, accelerator = planned(**flag)
        assert run_task(one, tokenizer, accelerator)
        assert paces[-1].averaging == averaging
        identity = identity_of(one, load_in_mode(one.task, one.settings, tokenizer, one.plan.privacy))
        assert {name: identity[name] for name in identity.keys() & {"ema", "average_last"}} == flag


@pytest.mark.parametrize(("typical", "warned"), [(1.9, False), (2.1, True)])
def test_a_clip_norm_far_below_the_gradients_is_said(typical: float, warned: bool) -> None:
    lines = describe_short_clip_norm(1.0, typical)
    assert len(lines) == warned
    assert all(line.startswith("warning: clip norm 1 is far below") for line in lines)


@pytest.mark.parametrize(("asked", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", None)])
def test_half_precision_launches_are_refused(asked: str, dtype: torch.dtype | None) -> None:
    """On a GPU: a CPU computes in float32 whatever is asked for."""
    launched: Any = SimpleNamespace(mixed_precision=asked, device=torch.device("cuda"))
    if dtype is not None:
        assert dtype_of_launch(launched) == dtype
        return
    with pytest.raises(InvalidArgument, match="mixed_precision='fp16': classifiers do not scale their losses"):
        dtype_of_launch(launched)
