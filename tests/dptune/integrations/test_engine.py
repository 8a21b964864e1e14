"""A plain Trainer with `PrivacyEngineCallback`: the oracle's gradient, and refusals of what would break it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dptune import InvalidArgument
from dptune.integrations.transformers import PrivacyEngine, PrivacyEngineCallback
from dptune.ledger import LEDGER_NAME
from tests.dptune.integrations.runs import (
    Collator,
    GradientLog,
    data,
    dp_trainer,
    draws,
    expected_gradient,
    lora_llama,
    no_noise,  # noqa: F401
    plain_trainer,
    privacy_arguments,
    training_arguments,
)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_noiseless_gradient_is_the_oracles_and_dptrainers(
    tmp_path: Path, clip_norm: float, accumulation: int
) -> None:
    model, own, log, own_log = lora_llama(), lora_llama(), GradientLog(), GradientLog()
    untouched = copy.deepcopy(model)
    shape = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 6 // accumulation}
    privacy = privacy_arguments(clip_norm=clip_norm)
    trainer, _ = plain_trainer(tmp_path / "plain", model, privacy=privacy, callbacks=[log], **shape)
    trainer.train()
    dp_trainer(tmp_path / "own", own, privacy=privacy, callbacks=[own_log], **shape).train()
    expected = expected_gradient(untouched, draws(1)[0], clip_norm=clip_norm)
    torch.testing.assert_close(log.grads[0], expected, rtol=1e-4, atol=1e-6 * clip_norm)
    assert len(log.grads) == len(own_log.grads) == 2
    torch.testing.assert_close(log.grads[1], own_log.grads[1], rtol=1e-4, atol=1e-5 * clip_norm)


@pytest.mark.usefixtures("no_noise")
def test_an_empty_micro_batch_adds_nothing(tmp_path: Path) -> None:
    model, log = lora_llama(), GradientLog()
    untouched = copy.deepcopy(model)
    trainer, _ = plain_trainer(
        tmp_path, model, callbacks=[log], per_device_train_batch_size=1, gradient_accumulation_steps=6, max_steps=1
    )
    trainer.train()
    (draw,) = draws(1)
    assert 0 < len(draw) < 6
    expected = expected_gradient(untouched, draw)
    torch.testing.assert_close(log.grads[0], expected, rtol=1e-4, atol=1e-6)


def test_one_ledger_line_a_step_before_the_gradient_is_used_and_epsilon_in_the_log(tmp_path: Path) -> None:
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_event: Any, **_: Any) -> None:
            seen.append(len((tmp_path / LEDGER_NAME).read_text().splitlines()))

    trainer, engine = plain_trainer(tmp_path, callbacks=[Watch()], max_steps=-1, num_train_epochs=2.0)
    trainer.train()
    assert seen == [1, 2, 3, 4]
    logged = [row["epsilon"] for row in trainer.state.log_history if "loss" in row]
    assert logged == sorted(logged)
    assert engine.epsilon <= logged[-1] == float(f"{logged[-1]:.4g}") <= 1.001 * engine.epsilon, "as printed"
    assert json.loads((tmp_path / "publish" / "privacy_report.json").read_text())["steps"] == 4


@pytest.mark.usefixtures("no_noise")
def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    quiet, watched = lora_llama(), lora_llama()
    plain_trainer(tmp_path / "quiet", quiet)[0].train()
    trainer, _ = plain_trainer(
        tmp_path / "watched", watched, eval_dataset=data(5, seed=9), eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    for one, other in zip(quiet.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [1, 2]


def assert_refused(match: str, trainer: transformers.Trainer) -> None:
    """Training is refused, no weight has changed, and no hook is left."""
    model = trainer.model
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InvalidArgument, match=match):
        trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_trainers_own_loss_is_refused(tmp_path: Path) -> None:
    assert_refused("privacy_engine.loss", plain_trainer(tmp_path, compute_loss_func=None)[0])
    assert not (tmp_path / LEDGER_NAME).exists()


def test_a_loss_that_is_multiplied_is_refused(tmp_path: Path) -> None:
    trainer, engine = plain_trainer(tmp_path)
    trainer.compute_loss_func = lambda *args, **kwargs: engine.loss(*args, **kwargs) / 3
    assert_refused("multiplied by", trainer)


def test_a_trainer_that_scales_for_accumulation_is_refused(tmp_path: Path) -> None:
    trainer, _ = plain_trainer(tmp_path)
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **kwargs: backward(loss / 3, **kwargs)
    assert_refused("multiplied by", trainer)


def test_a_step_of_fewer_micro_batches_than_its_draw_has_is_not_released(tmp_path: Path) -> None:
    trainer, engine = plain_trainer(tmp_path)

    class CutsShort(transformers.TrainerCallback):
        def on_step_begin(self, *_event: Any, **_: Any) -> None:
            engine._collected = -1  # one of them never comes

    trainer.add_callback(CutsShort())
    assert_refused(r"^gradient_accumulation_steps=3: 2 micro-batches in a step", trainer)
    assert not (tmp_path / LEDGER_NAME).exists()


def test_its_own_sampler_is_refused(tmp_path: Path) -> None:
    assert_refused("train_dataset=privacy_engine.dataset", plain_trainer(tmp_path, train_dataset_of_trainer=data())[0])


def test_another_model_is_refused(tmp_path: Path) -> None:
    trainer, engine = plain_trainer(tmp_path)
    engine.model = lora_llama(1)
    assert_refused("model=", trainer)


def test_other_arguments_than_the_engines_are_refused(tmp_path: Path) -> None:
    trainer, _ = plain_trainer(tmp_path)
    trainer.args = copy.copy(trainer.args)
    trainer.args.gradient_accumulation_steps = 1
    assert_refused("--gradient_accumulation_steps=", trainer)
    trainer, _ = plain_trainer(tmp_path)
    trainer.args = copy.copy(trainer.args)
    trainer.args.max_steps = 9
    assert_refused("args=", trainer)


@pytest.mark.parametrize(
    ("argument", "value"), [("max_grad_norm", 1.0), ("label_smoothing_factor", 0.1), ("dataloader_num_workers", 2)]
)
def test_arguments_that_break_it_are_refused_by_engine_and_callback(tmp_path: Path, argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"--{argument}"):
        plain_trainer(tmp_path, **{argument: value})
    trainer, _ = plain_trainer(tmp_path)
    object.__setattr__(trainer.args, argument, value)
    assert_refused(f"--{argument}", trainer)


@pytest.mark.parametrize("known", [[], data()])
def test_a_collator_that_adds_rows_is_refused(known: list[Any], tmp_path: Path) -> None:
    """Before training; and in a step, if it does so for items of the data set alone."""

    def add(features: list[Any]) -> Any:
        return Collator()([*features, *(one for one in features if not known or one in known)])

    trainer, _ = plain_trainer(tmp_path, data_collator=add)
    assert_refused(r"^data_collator='\d rows': for a micro-batch of", trainer)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = training_arguments(tmp_path, transformers.TrainingArguments)
    monkeypatch.setattr(type(args), "world_size", property(lambda _: 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgument, match="DPTrainer"):
        PrivacyEngine(lora_llama(), args, data(), privacy_arguments())


def test_less_than_float32_is_refused(tmp_path: Path) -> None:
    """The rows of a micro-batch follow the draw, and so would each row's rounding."""
    trainer, _ = plain_trainer(tmp_path, lora_llama().to(torch.bfloat16))
    assert_refused(r"^model=LlamaForCausalLM in less than float32: .* use DPTrainer", trainer)


def test_products_of_less_than_float32_are_refused(tmp_path: Path) -> None:
    """No operation shows them: their results are float32."""
    trainer, _ = plain_trainer(tmp_path)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        assert_refused(r"^model=LlamaForCausalLM in less than float32: .* use DPTrainer", trainer)
    finally:
        matmul.fp32_precision = before


def test_less_than_float32_within_the_losses_is_refused(tmp_path: Path) -> None:
    model = lora_llama()
    forward = model.forward
    trainer, _ = plain_trainer(tmp_path, model)

    def rounded(*args: Any, **how: Any) -> Any:
        with torch.autocast("cpu"):
            return forward(*args, **how)

    model.forward = rounded
    assert_refused(r"^model=LlamaForCausalLM in less than float32: .* use DPTrainer", trainer)
    assert not (tmp_path / LEDGER_NAME).exists() or not (tmp_path / LEDGER_NAME).read_text()


def test_another_rate_of_the_callers_own_optimizer_is_refused_on_resume(tmp_path: Path) -> None:
    """transformers restores the optimizer of the checkpoint, so the new rate would be ignored in silence."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "ignore_data_skip": True}

    def own(rate: float) -> transformers.Trainer:
        model = lora_llama()
        made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        optimizers = made, torch.optim.lr_scheduler.LambdaLR(made, lambda _: 1.0)
        return plain_trainer(tmp_path, model, optimizers=optimizers, **settings)[0]

    own(0.1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(InvalidArgument, match=r"optimizer\.0\.lr was 0\.1 in the checkpoint and is 0\.3 now"):
        own(0.3).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "publish" / "privacy_report.json").unlink()
    own(0.1).train(resume_from_checkpoint=checkpoint)


def test_disable_dp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="disable_dp"):
        plain_trainer(tmp_path, privacy=privacy_arguments(disable_dp=True))


def test_the_engine_without_its_callback_is_refused(tmp_path: Path) -> None:
    trainer, _ = plain_trainer(tmp_path)
    trainer.remove_callback(PrivacyEngineCallback)
    assert_refused("callbacks=", trainer)


def test_resume_continues_the_ledger_and_counts_both(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer, _ = plain_trainer(tmp_path, **settings)
    trainer.train()
    (tmp_path / "publish" / "privacy_report.json").unlink()
    with pytest.raises(InvalidArgument, match="ignore_data_skip"):
        plain_trainer(tmp_path, **settings)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    other, _ = plain_trainer(tmp_path, ignore_data_skip=True, learning_rate=0.3, **settings)
    with pytest.raises(InvalidArgument, match=r"learning_rate was 0\.1 in the checkpoint and is 0\.3 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again, engine = plain_trainer(tmp_path, ignore_data_skip=True, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 3
    assert len((tmp_path / LEDGER_NAME).read_text().splitlines()) == 5
    assert engine.epsilon is not None
    assert json.loads((tmp_path / "publish" / "privacy_report.json").read_text())["repeated_steps"] == 2
