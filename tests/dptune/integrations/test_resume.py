"""Checkpoints of `DPTrainer`: a run resumes, its ledger counts all steps, and the budget holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dptune import InvalidArgument, Ledger
from dptune.budget import Budget
from dptune.integrations.state import read_privacy_state
from dptune.ledger import LEDGER_NAME
from tests.dptune.integrations.runs import data, dp_trainer, lora_llama, privacy_arguments

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "optim": "adamw_torch"}


def parameters(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Crash(transformers.TrainerCallback):
    """Raises an error after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def crash(folder: Path, step: int, **changed: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        dp_trainer(folder, callbacks=[Crash(step)], **(SAVING | changed)).train()


@pytest.mark.parametrize(("dropout", "average"), [(0.0, {}), (0.3, {"ema": 0.5}), (0.0, {"average_last": 0.75})])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, dropout: float, average: dict[str, float]
) -> None:
    whole, resumed, settings = lora_llama(dropout=dropout), lora_llama(1, dropout=dropout), SAVING | average
    dp_trainer(tmp_path / "whole", whole, **settings).train()
    crash(tmp_path / "crashed", 2, model=lora_llama(dropout=dropout), **average)
    trainer = dp_trainer(tmp_path / "crashed", resumed, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    frozen = [name for name, parameter in whole.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert torch.equal(parameters(whole), parameters(resumed))
    assert Ledger(tmp_path / "crashed" / LEDGER_NAME).steps == 4


def test_steps_beyond_the_checkpoint_count_too(tmp_path: Path) -> None:
    crash(tmp_path, 3, save_steps=2)
    trainer = dp_trainer(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Ledger(tmp_path / LEDGER_NAME).steps == 5
    report = json.loads((tmp_path / "publish" / "privacy_report.json").read_text())
    assert (report["steps"], report["repeated_steps"]) == (5, 1)
    assert trainer.epsilon == Ledger(tmp_path / LEDGER_NAME).running_epsilon(1e-3)
    copied = (tmp_path / "checkpoint-4" / LEDGER_NAME).read_bytes()
    assert copied == (tmp_path / LEDGER_NAME).read_bytes()


def test_the_run_stops_before_the_step_that_would_exceed_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    privacy = {"privacy": privacy_arguments(target_epsilon=3.0, insecure_test_seed=None)}
    crash(tmp_path, 3, save_steps=1, **privacy)
    trainer = dp_trainer(tmp_path, **SAVING, **privacy)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2  # three steps were released, one was left
    report = json.loads((tmp_path / "publish" / "privacy_report.json").read_text())
    assert report["steps"] == 4
    assert report["epsilon"] <= 3.0
    assert "one more would exceed the target epsilon" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-2").exists()
    (tmp_path / "publish" / "privacy_report.json").unlink()
    spent = dp_trainer(tmp_path, **SAVING, **privacy)
    before = parameters(spent.model)
    spent.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert Ledger(tmp_path / LEDGER_NAME).steps == 4
    assert spent.state.global_step == 1
    assert parameters(spent.model).shape == before.shape


def test_a_step_beyond_the_budget_is_never_released(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path, max_steps=1)
    trainer.train()
    run = trainer._run
    assert run is not None
    run.prepare(trainer.model)
    with run, pytest.raises(RuntimeError, match="beyond the last step"):
        run.finish_step()
    assert Ledger(tmp_path / LEDGER_NAME).steps == 1


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("clip_norm", {"privacy": privacy_arguments(clip_norm=0.25)}),
        ("noise_multiplier", {"privacy": privacy_arguments(noise_multiplier=0.5)}),
        ("delta", {"privacy": privacy_arguments(delta=1e-4)}),
        ("sampling_probability", {"gradient_accumulation_steps": 2}),
        ("num_examples", {"train_dataset": data(24), "gradient_accumulation_steps": 6}),
        ("privacy_unit", {"privacy_unit": "one author"}),
    ],
)
def test_another_mechanism_is_refused_by_name(tmp_path: Path, name: str, changed: dict[str, Any]) -> None:
    crash(tmp_path, 1)
    with pytest.raises(InvalidArgument, match=rf"{name} was .* in the checkpoint and is"):
        dp_trainer(tmp_path, **(SAVING | changed)).train(resume_from_checkpoint=True)
    assert Ledger(tmp_path / LEDGER_NAME).steps == 1


UPDATES: dict[str, Any] = {
    "learning_rate": 0.2,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_epsilon": 1e-6,
    "optim": "sgd",
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "dp_adam": True,
    "lr_scheduler_kwargs": {"num_cycles": 2},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    crash(folder, 1)
    return folder


@pytest.mark.parametrize("name", UPDATES)
def test_another_update_is_refused_by_name(stopped: Path, name: str) -> None:
    """transformers would load the optimizer's and the schedule's old settings, and train on with those."""
    with pytest.raises(InvalidArgument, match=rf"{name} was .* in the checkpoint and is .* now"):
        dp_trainer(stopped, **(SAVING | {name: UPDATES[name]})).train(resume_from_checkpoint=True)
    assert Ledger(stopped / LEDGER_NAME).steps == 1


def test_another_optimizer_of_the_callers_own_is_refused(tmp_path: Path) -> None:
    def own(rate: float) -> dict[str, Any]:
        model = lora_llama()
        made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
        return {"model": model, "optimizers": (made, schedule)}

    crash(tmp_path, 1, **own(0.1))
    with pytest.raises(InvalidArgument, match=r"optimizer\.0\.lr was 0\.1 in the checkpoint and is 0\.3 now"):
        dp_trainer(tmp_path, **(SAVING | own(0.3))).train(resume_from_checkpoint=True)
    dp_trainer(tmp_path, **(SAVING | own(0.1))).train(resume_from_checkpoint=True)


def test_a_ledger_that_lost_lines_is_refused(tmp_path: Path) -> None:
    crash(tmp_path, 2)
    ledger = tmp_path / LEDGER_NAME
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    with pytest.raises(InvalidArgument, match="epsilon would be too small"):
        dp_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    crash(tmp_path, 1)
    with pytest.raises(InvalidArgument, match="holds a run already"):
        dp_trainer(tmp_path, **SAVING).train()


def test_a_run_whose_ledger_is_entered_in_a_budget_begins(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.jsonl")
    budget.enter_training("run", tmp_path / "run" / LEDGER_NAME, unit="one example")
    crash(tmp_path / "run", 1)
    assert [spend.steps for spend in budget.spends(budget.stages[0])] == [1]


def test_a_checkpoint_of_another_folder_or_without_a_ledger_is_refused(tmp_path: Path) -> None:
    crash(tmp_path / "run", 1)
    with pytest.raises(InvalidArgument, match="not a checkpoint of this run"):
        dp_trainer(tmp_path / "other", **SAVING).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    with pytest.raises(InvalidArgument, match="not a checkpoint of this run"):
        dp_trainer(tmp_path / "other", **SAVING).train(resume_from_checkpoint=True)
    (tmp_path / "run" / "checkpoint-1" / "privacy_state.json").unlink()
    with pytest.raises(InvalidArgument, match=r"privacy_state\.json"):
        dp_trainer(tmp_path / "run", **SAVING).train(resume_from_checkpoint=True)


def test_a_run_without_privacy_resumes_too(tmp_path: Path) -> None:
    privacy = {"privacy": privacy_arguments(disable_dp=True)}
    whole, resumed = lora_llama(), lora_llama()
    dp_trainer(tmp_path / "whole", whole, **SAVING, **privacy).train()
    crash(tmp_path / "crashed", 2, **privacy)
    dp_trainer(tmp_path / "crashed", resumed, **SAVING, **privacy).train(resume_from_checkpoint=True)
    torch.testing.assert_close(parameters(whole), parameters(resumed))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = dp_trainer(
        tmp_path,
        **(SAVING | {"learning_rate": 0.5}),
        privacy=privacy_arguments(noise_multiplier=50.0, validation_is_public=True),
        eval_dataset=data(5, seed=9),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        prediction_loss_only=True,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(set(losses)) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses))


class Killed(transformers.TrainerCallback):
    """Ends the process, as it were, after the Trainer has deleted older checkpoints."""

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_the_only_checkpoint_that_is_left_is_complete_before_older_ones_go(tmp_path: Path) -> None:
    settings = {**SAVING, "save_total_limit": 1}
    with pytest.raises(KeyboardInterrupt):
        dp_trainer(tmp_path, **settings, callbacks=[Killed()]).train()
    assert [one.name for one in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert read_privacy_state(tmp_path / "checkpoint-3").step == 3
    dp_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)
    assert Ledger(tmp_path / LEDGER_NAME).steps == 4


def test_a_checkpoint_that_was_interrupted_is_refused_in_a_line(tmp_path: Path) -> None:
    dp_trainer(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(
        InvalidArgument, match=r"checkpoint-2'?: is not complete, it has no trainer_state\.json; give an"
    ):
        read_privacy_state(tmp_path / "checkpoint-2")


class StopsEarly(transformers.TrainerCallback):
    """Ends the training after its second step, perhaps because of what it saw."""

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_all_planned_steps_count_where_the_training_ends_early(tmp_path: Path) -> None:
    """What ends it may depend on its steps, so a bound for the steps that it took would not hold."""
    privacy = {"privacy": privacy_arguments(insecure_test_seed=None)}
    dp_trainer(tmp_path / "whole", **SAVING, **privacy).train()
    dp_trainer(tmp_path / "early", **SAVING, **privacy, callbacks=[StopsEarly()]).train()
    whole, early = (
        json.loads((tmp_path / run / "publish" / "privacy_report.json").read_text()) for run in ("whole", "early")
    )
    assert (early["steps"], early["unused_steps"]) == (2, 2)
    assert early["epsilon"] == whole["epsilon"]
    ledger = Ledger(tmp_path / "early" / LEDGER_NAME)
    assert (ledger.steps, ledger.unused_steps) == (2, 2)
