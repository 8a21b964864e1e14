"""The callback calls the engine where the Trainer is, and lets no hook stay after a refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.integrations.transformers import PrivacyEngineCallback
from tests.dptune.integrations.runs import plain_trainer


class Engine:
    """Notes what is asked of it; `refuses` names a call that is refused."""

    def __init__(self, refuses: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refuses, self.epsilon, self.dataset = refuses, 1.23456, self

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> None:
            self.calls.append((name, *args))
            if name == self.refuses:
                raise InvalidArgument("something", 1, "is wrong")

        return call


ARGS, STATE = SimpleNamespace(output_dir="out"), SimpleNamespace(global_step=4, log_history=[{"loss": 1.0}])
EVENTS: dict[str, list[tuple[Any, ...]]] = {
    "on_train_begin": [("begin", ARGS, STATE, "model", "loader")],
    "on_epoch_begin": [("restart",)],
    "on_step_begin": [("begin_step",)],
    "on_substep_end": [("collect",)],
    "on_pre_optimizer_step": [("collect",), ("finish",)],
    "on_save": [("save", Path("out/checkpoint-4"))],
    "on_train_end": [("end", "tokenizer")],
}


def call(callback: Any, event: str) -> None:
    getattr(callback, event)(ARGS, STATE, None, model="model", train_dataloader="loader", processing_class="tokenizer")


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_is_a_call_of_the_engine(event: str) -> None:
    engine: Any = Engine()
    call(PrivacyEngineCallback(engine), event)
    assert engine.calls == EVENTS[event]


@pytest.mark.parametrize(
    ("event", "refuses"),
    [
        ("on_train_begin", "begin"),
        ("on_substep_end", "collect"),
        ("on_pre_optimizer_step", "collect"),
        ("on_pre_optimizer_step", "finish"),
    ],
)
def test_a_refusal_takes_the_hooks_off_and_goes_on(event: str, refuses: str) -> None:
    engine: Any = Engine(refuses)
    with pytest.raises(InvalidArgument, match="is wrong"):
        call(PrivacyEngineCallback(engine), event)
    assert engine.calls[-1] == ("close",)


def test_epsilon_is_logged_rounded_up() -> None:
    engine: Any = Engine()
    logs, state = {"loss": 1.0}, SimpleNamespace(log_history=[{"loss": 1.0}])
    PrivacyEngineCallback(engine).on_log(ARGS, state, None, logs=logs)
    assert logs["epsilon"] == state.log_history[-1]["epsilon"] == 1.235
    engine.epsilon = None
    PrivacyEngineCallback(engine).on_log(ARGS, state, None, logs=(fresh := {"loss": 1.0}))
    assert fresh == {"loss": 1.0}


def test_a_trainer_calls_them_in_the_order_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    trainer, engine = plain_trainer(tmp_path, max_steps=1)
    for name in ("begin", "begin_step", "collect", "finish", "end"):
        real = getattr(engine, name)

        def noted(*args: Any, _real: Any = real, _name: str = name) -> None:
            seen.append(_name)
            _real(*args)

        monkeypatch.setattr(engine, name, noted)
    trainer.train()
    assert seen == ["begin", "begin_step", "collect", "collect", "collect", "finish", "end"]
