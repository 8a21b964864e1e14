"""What a Trainer's checkpoint says of the private run: which one, how far, its clip norm, and its ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dptune import InvalidArgument, Ledger
from dptune.clipping_styles import Adaptive
from dptune.integrations.state import PRIVACY_STATE_NAME, read_privacy_state, save_privacy_state
from dptune.ledger import LEDGER_NAME
from dptune.run.plan import RunPlan, make_plan
from dptune.run.session import PrivateRun, SavedRun
from dptune.run.settings import PrivacySettings


def plan(*, private: bool = True) -> RunPlan:
    clipping = Adaptive(count_noise=2.0)
    settings = PrivacySettings(noise_multiplier=1.0, delta=1e-3, clipping=clipping) if private else None
    return make_plan(settings, num_examples=50, batch=10, steps=9)


def step(run: PrivateRun, model: nn.Module, count: int) -> None:
    for _ in range(count):
        run.begin_step()
        drawn = run.sampler().draw()
        run.backward(model(torch.ones(max(len(drawn), 1), 3)).sum(1), items=drawn)
        run.finish_step()


def saved_after_two_steps(folder: Path, *, private: bool = True) -> PrivateRun:
    """A run of 4 steps with a checkpoint after 2."""
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").touch()  # the Trainer's own last file
    run, model = PrivateRun(plan(private=private), folder), nn.Linear(3, 2)
    run.prepare(model)
    with run:
        step(run, model, 2)
        save_privacy_state(run, folder / "checkpoint-2")
        step(run, model, 2)
    return run


def test_a_checkpoint_knows_its_run_and_no_later_step(tmp_path: Path) -> None:
    run = saved_after_two_steps(tmp_path)
    state = read_privacy_state(tmp_path / "checkpoint-2")
    assert (state.step, state.ledger_steps, state.identity) == (2, 2, run.identity)
    copy, whole = (path.read_bytes().splitlines() for path in (state.ledger, tmp_path / LEDGER_NAME))
    assert copy == whole[:2]
    assert len(whole) == 4
    assert state.mechanism["clip_norm"] == json.loads(whole[2])["clip_norm"] != 1.0


def test_a_repeated_step_is_counted_in_the_next_checkpoint(tmp_path: Path) -> None:
    saved_after_two_steps(tmp_path)
    run = PrivateRun(plan(), tmp_path, resume_from=read_privacy_state(tmp_path / "checkpoint-2"))
    model = nn.Linear(3, 2)
    run.prepare(model)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").touch()
    with run:
        step(run, model, 1)
        save_privacy_state(run, tmp_path / "checkpoint-3")
    state = read_privacy_state(tmp_path / "checkpoint-3")
    assert (state.step, state.ledger_steps) == (3, 5)
    assert Ledger(state.ledger).steps == 5


def test_a_run_without_privacy_has_no_ledger_to_copy(tmp_path: Path) -> None:
    saved_after_two_steps(tmp_path, private=False)
    state = read_privacy_state(tmp_path / "checkpoint-2")
    assert (state.step, state.ledger_steps, state.mechanism) == (2, 0, {})
    assert not (tmp_path / "checkpoint-2" / LEDGER_NAME).exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"step": 2}', '{"step": 2, "other": 1}'])
def test_a_checkpoint_of_another_kind_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / PRIVACY_STATE_NAME).write_text(content)
    told = rf"^--resume_from_checkpoint=.*holds no readable {PRIVACY_STATE_NAME} \(\w+\); give an older checkpoint"
    with pytest.raises(InvalidArgument, match=told):
        read_privacy_state(tmp_path)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    state = {"step": 1, "ledger_steps": 1, "identity": {"delta": 1e-5}, "mechanism": {}}
    (tmp_path / PRIVACY_STATE_NAME).write_text(json.dumps(state))
    (tmp_path / "trainer_state.json").touch()
    assert read_privacy_state(tmp_path) == SavedRun(1, tmp_path / LEDGER_NAME, 1, {"delta": 1e-5})
