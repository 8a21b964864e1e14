"""`DPTrainer`: its gradient equals the oracle's, its draws are Poisson, its epsilon is right, its ledger complete."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers

from dptune import InvalidArgument, accounting
from dptune.accounting.rounding import rounded_up
from dptune.integrations.losses import DefaultLosses
from dptune.keystream import FIXED
from dptune.ledger import LEDGER_NAME
from dptune.sampling import FIXED_KEY
from tests.dptune.integrations.runs import (
    COUNT,
    Collator,
    GradientLog,
    data,
    dp_trainer,
    draws,
    expected_gradient,
    lines,
    lora_llama,
    no_noise,  # noqa: F401
    plain_trainer,
    privacy_arguments,
)
from tests.examples import random_examples
from tests.reference import example_gradients, flat


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("shape", [(2, 3), (6, 1), (1, 6)])
def test_the_noiseless_gradient_is_the_oracles(tmp_path: Path, clip_norm: float, shape: tuple[int, int]) -> None:
    model, log = lora_llama(), GradientLog()
    untouched = copy.deepcopy(model)
    dp_trainer(
        tmp_path,
        model,
        privacy=privacy_arguments(clip_norm=clip_norm),
        callbacks=[log],
        max_steps=1,
        per_device_train_batch_size=shape[0],
        gradient_accumulation_steps=shape[1],
    ).train()
    (draw,) = draws(1)
    expected = expected_gradient(untouched, draw, clip_norm=clip_norm)
    torch.testing.assert_close(log.grads[0], expected, rtol=1e-4, atol=1e-6 * clip_norm)


def test_the_noise_is_added_once_and_divided_by_the_expected_batch(tmp_path: Path) -> None:
    log = GradientLog()
    privacy = privacy_arguments(noise_multiplier=500.0, insecure_test_seed=None)
    dp_trainer(tmp_path, privacy=privacy, callbacks=[log], max_steps=3).train()
    values = torch.cat(log.grads)
    assert values.std().item() == pytest.approx(500.0 * 0.5 / 6, rel=0.1)
    assert not torch.equal(log.grads[0], log.grads[1])


@pytest.mark.usefixtures("no_noise")
def test_an_empty_draw_is_a_step_of_noise_alone(tmp_path: Path) -> None:
    log = GradientLog()
    trainer = dp_trainer(
        tmp_path,
        privacy=privacy_arguments(delta=1e-4, insecure_test_seed=1),
        callbacks=[log],
        train_dataset=data(COUNT),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=15,
    )
    trainer.train()
    empty = [not grad.any() for grad in log.grads]
    assert len(empty) == len(lines(tmp_path)) == 15
    assert any(empty)
    assert not all(empty)


def test_draws_are_poisson_and_fresh(tmp_path: Path) -> None:
    drawn: list[int] = []
    trainer = dp_trainer(tmp_path, privacy=privacy_arguments(insecure_test_seed=None), max_steps=60, logging_steps=100)
    step = trainer.training_step

    def count(model: Any, inputs: Any, *rest: Any) -> Any:
        assert sum(len(batch.items) for batch in inputs["micro_batches"]) == inputs["drawn"]
        assert all(len(batch.inputs["labels"]) <= 2 for batch in inputs["micro_batches"])
        drawn.append(inputs["drawn"])
        return step(model, inputs, *rest)

    trainer.training_step = count  # type: ignore[method-assign]
    trainer.train()
    assert len(drawn) == 60
    assert len(set(drawn)) > 3
    assert np.mean(drawn) == pytest.approx(6, abs=6 * np.sqrt(12 * 0.25 / 60))


def test_epsilon_is_that_of_accounting_and_in_every_log(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path, max_steps=-1, num_train_epochs=2.0)
    trainer.train()
    settings = {"noise_multiplier": 1.0, "sampling_probability": 0.5, "delta": 1e-3}
    assert trainer.plan.steps == len(lines(tmp_path)) == 4
    assert trainer.plan.privacy is not None
    assert trainer.plan.privacy.planned_epsilon() == accounting.epsilon(steps=4, **settings)
    logged = [row["epsilon"] for row in trainer.state.log_history if "loss" in row]
    exact = [accounting.epsilon(steps=steps, **settings) for steps in range(1, 5)]
    assert logged == pytest.approx(exact, rel=0.02)
    # transformers prints four figures of a logged number.
    assert all(float(f"{upper:.4g}") >= lower for upper, lower in zip(logged, exact, strict=True))


def test_the_report_holds_the_ledgers_epsilon_where_the_noise_is_secret(tmp_path: Path) -> None:
    dp_trainer(tmp_path, privacy=privacy_arguments(insecure_test_seed=None, target_epsilon=3.0)).train()
    report = json.loads((tmp_path / "publish" / "privacy_report.json").read_text())
    assert report["guarantee"] == "dp"
    assert 2.9 < report["epsilon"] <= 3.0
    assert report["steps"] == 2


def test_the_report_of_a_seeded_run_promises_nothing(tmp_path: Path) -> None:
    dp_trainer(tmp_path).train()
    assert json.loads((tmp_path / "publish" / "privacy_report.json").read_text())["guarantee"] == "none"


def test_a_ledger_line_is_there_before_the_gradient_is_used(tmp_path: Path) -> None:
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            seen.append((state.global_step, len(lines(tmp_path))))

    dp_trainer(tmp_path, callbacks=[Watch()]).train()
    assert seen == [(0, 1), (1, 2)]
    settings = {"noise_multiplier": 1.0, "sampling_probability": 0.5, "clip_norm": 0.5}
    assert lines(tmp_path)[0] == {"step": 1, **settings, "sampler": FIXED_KEY, "noise_key": FIXED}


def parameters(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_evaluation_and_metrics_change_nothing(tmp_path: Path) -> None:
    quiet, watched = lora_llama(), lora_llama()
    dp_trainer(tmp_path / "quiet", quiet).train()
    trainer = dp_trainer(
        tmp_path / "watched",
        watched,
        eval_dataset=data(5, seed=9),
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        compute_metrics=lambda prediction: {"rows": float(len(prediction.predictions))},
        dataloader_num_workers=1,
    )
    trainer.train()
    assert torch.equal(parameters(quiet), parameters(watched))
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 1, 2]
    assert {row["eval_rows"] for row in evaluated} == {5.0}
    assert "epsilon" in evaluated[-1]


def test_nothing_stays_on_the_model(tmp_path: Path) -> None:
    model = lora_llama()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    dp_trainer(tmp_path, model).train()
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_takes_the_hooks_off_too(tmp_path: Path) -> None:
    model = lora_llama()

    def broken(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dp_trainer(tmp_path, model, losses=broken).train()
    assert not any(module._forward_hooks for module in model.modules())
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_without_privacy_the_gradient_is_the_sum_over_the_expected_batch(tmp_path: Path) -> None:
    model, log = lora_llama(), GradientLog()
    untouched = copy.deepcopy(model)
    trainer = dp_trainer(tmp_path, model, privacy=privacy_arguments(disable_dp=True), callbacks=[log], max_steps=1)
    trainer.train()
    expected = expected_gradient(untouched, draws(1)[0], clip_norm=1e9)
    torch.testing.assert_close(log.grads[0], expected, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / LEDGER_NAME).exists()
    assert json.loads((tmp_path / "publish" / "privacy_report.json").read_text())["guarantee"] == "none"
    assert trainer.epsilon is None


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lora_llama()
    before = parameters(model)
    output = dp_trainer(tmp_path / "run", model, dry_run=True).train()
    assert torch.equal(before, parameters(model))
    assert output.global_step == 0
    assert not (tmp_path / "run" / LEDGER_NAME).exists()
    printed = capsys.readouterr().out
    assert "expected batch size    6" in printed
    spent = accounting.epsilon(noise_multiplier=1.0, sampling_probability=0.5, steps=2, delta=1e-3)
    assert rounded_up(spent) in printed
    assert "how much data" in printed


@pytest.mark.usefixtures("no_noise")
def test_columns_that_the_model_does_not_know_are_removed(tmp_path: Path) -> None:
    log, rows = GradientLog(), [row | {"source": "somewhere"} for row in data()]
    dataset = datasets.Dataset.from_list(rows)

    def strict(features: list[Any]) -> Any:
        assert all(feature.keys() == {"input_ids", "labels"} for feature in features)
        return Collator()(features)

    dp_trainer(
        tmp_path, callbacks=[log], data_collator=strict, train_dataset=dataset, remove_unused_columns=True, max_steps=1
    ).train()
    torch.testing.assert_close(log.grads[0], expected_gradient(lora_llama(), draws(1)[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_noise")
def test_rows_of_one_unit_are_clipped_together(tmp_path: Path) -> None:
    log, model = GradientLog(), lora_llama()

    def reversed_too(features: list[Any]) -> Any:
        return Collator()([row for one in features for row in (one, {key: one[key][::-1] for key in one})])

    dp_trainer(
        tmp_path,
        model,
        data_collator=reversed_too,
        rows_per_unit=2,
        callbacks=[log],
        max_steps=1,
        privacy=privacy_arguments(clip_norm=1e-3),
    ).train()
    drawn = [random_examples(COUNT)[item] for item in draws(1)[0]]
    both = [[(ids, labels), (ids[::-1], labels[::-1])] for ids, labels in drawn]
    sums = [torch.stack([flat(one) for one in example_gradients(lora_llama(), pair)]).sum(0) for pair in both]
    expected = torch.stack([1e-3 * one / one.norm() for one in sums]).sum(0) / 6
    torch.testing.assert_close(log.grads[0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("argument", "value"), [("max_grad_norm", 1.0), ("gradient_accumulation_steps", 7)])
def test_arguments_that_break_it_are_refused_by_name(tmp_path: Path, argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"--{argument}="):
        dp_trainer(tmp_path, **{argument: value})


def test_a_loss_of_the_micro_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="compute_loss_func"):
        dp_trainer(tmp_path, compute_loss_func=lambda outputs, *_: outputs.loss)
    with pytest.raises(InvalidArgument, match="couples"):
        dp_trainer(tmp_path, losses=lambda model, inputs: model(**inputs).loss).train()
    assert not (tmp_path / LEDGER_NAME).exists()


def test_losses_of_other_rows_are_refused(tmp_path: Path) -> None:
    def doubled(model: Any, inputs: Any) -> Any:
        return DefaultLosses()(model, inputs).repeat_interleave(2 if training else 1)

    training, trainer = False, dp_trainer(tmp_path, losses=doubled)
    step = trainer.training_step

    def later(*rest: Any) -> Any:
        nonlocal training
        training = True  # after the checks on random items
        return step(*rest)

    trainer.training_step = later  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match=r"^rows_per_unit='\d+ losses': for \d+ items with 1 rows each"):
        trainer.train()
    assert not (tmp_path / LEDGER_NAME).exists() or not lines(tmp_path)


@pytest.mark.parametrize("rows", [np.ones(COUNT - 1, dtype=int), np.zeros(COUNT, dtype=int)])
def test_rows_of_items_must_be_one_number_at_least_1_for_each(tmp_path: Path, rows: np.ndarray) -> None:
    with pytest.raises(InvalidArgument, match="rows_per_unit"):
        dp_trainer(tmp_path, rows_per_unit=rows)


def masks_of(folder: Path, *, plain: bool, **privacy: Any) -> list[float]:
    """Numbers of torch's generator (the source of dropout masks) in the last forward pass of each of two steps."""
    model, found = lora_llama(), [0.0, 0.0]
    settings: dict[str, Any] = {"max_steps": 2, "seed": 7, "privacy": privacy_arguments(**privacy)}
    trainer = plain_trainer(folder, model, **settings)[0] if plain else dp_trainer(folder, model, **settings)

    def note(*_: Any) -> None:
        found[trainer.state.global_step] = torch.rand(()).item()

    model.base_model.register_forward_hook(note)
    trainer.train()
    assert 0 not in found
    return found


@pytest.mark.parametrize("plain", [False, True])
def test_a_checkpoint_does_not_tell_the_masks_of_any_step(tmp_path: Path, plain: bool) -> None:
    """transformers saves the state of torch's generator, and with it the seed of the masks."""
    model, seeds = lora_llama(), set()
    privacy = privacy_arguments(insecure_test_seed=None)
    settings: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "privacy": privacy}
    trainer = plain_trainer(tmp_path, model, **settings)[0] if plain else dp_trainer(tmp_path, model, **settings)
    model.get_input_embeddings().register_forward_pre_hook(
        lambda *_: seeds.add(torch.initial_seed()) if model.training else None
    )
    trainer.train()
    assert len(seeds) >= 3
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"checkpoint-{step}" / "rng_state.pth", weights_only=False)
        generator = torch.Generator()
        generator.set_state(saved["cpu"])
        assert generator.initial_seed() not in seeds


def test_its_model_card_is_the_privacy_reports(tmp_path: Path) -> None:
    """The Trainer's own card has a table of losses, which are measured on the data."""
    trainer = dp_trainer(tmp_path, privacy=privacy_arguments(insecure_test_seed=None))
    trainer.train()
    trainer.create_model_card()
    card, report = (
        (tmp_path / "publish" / "README.md").read_text(),
        json.loads((tmp_path / "publish" / "privacy_report.json").read_text()),
    )
    assert "Training Loss" not in card
    (claimed,) = re.findall(r"ε = ([\d.]+) at", card)
    assert report["epsilon"] <= float(claimed) <= report["epsilon"] + 0.01


@pytest.mark.parametrize("plain", [False, True])
def test_dropouts_masks_are_secret_though_the_trainers_seed_is_not(tmp_path: Path, plain: bool) -> None:
    first, second = (masks_of(tmp_path / name, plain=plain, insecure_test_seed=None) for name in "ab")
    assert first[0] != second[0]
    assert first[1] != second[1]
    again, same = (masks_of(tmp_path / name, plain=plain, insecure_test_seed=3) for name in "cd")
    assert again == same


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_may_end_early(tmp_path: Path, workers: int) -> None:
    """The draws that workers have prefetched by then are dropped; each epoch takes half of its 6 steps."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = state.global_step % 3 == 0

    settings = {"max_steps": 12, "dataloader_num_workers": workers, "gradient_accumulation_steps": 1}
    trainer = dp_trainer(tmp_path, callbacks=[Stop()], **settings)
    trainer.train()
    assert trainer.state.global_step == 6
    assert len((tmp_path / LEDGER_NAME).read_text().splitlines()) == 6
