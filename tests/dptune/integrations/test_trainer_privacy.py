"""What `DPTrainer` takes beside the flat clip norm: groups, clipping styles, the optimizer that knows the noise, and
a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dptune import InvalidArgument, accounting
from dptune.clipping_styles import Adaptive, Automatic, Clipping, PerLayer
from dptune.integrations import trainer as module
from dptune.integrations.engine import PrivacyEngine
from dptune.mechanism import ROUNDING
from dptune.optimizers import DPAdam
from dptune.units.unit import ItemUnit
from tests.dptune.integrations.runs import (
    data,
    dp_trainer,
    lines,
    lora_llama,
    plain_trainer,
    privacy_arguments,
    training_arguments,
)
from tests.dptune.integrations.test_resume import SAVING, crash, parameters

SECRET = {"insecure_test_seed": None}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "publish" / "privacy_report.json").read_text())


@pytest.mark.usefixtures("with_plots")
def test_a_group_size_is_in_ledger_report_and_epsilon(tmp_path: Path) -> None:
    unit = ItemUnit("one household (up to 3 items)", group_size=3)
    trainer = dp_trainer(tmp_path, privacy=privacy_arguments(noise_multiplier=4.0, **SECRET), privacy_unit=unit)
    trainer.train()
    setting = {"noise_multiplier": 4.0, "sampling_probability": 0.5, "steps": 2, "delta": 1e-3}
    for_all, for_one = accounting.epsilon(**setting, group_size=3), accounting.epsilon(**setting)
    assert for_all > 2 * for_one
    assert [line["group_size"] for line in lines(tmp_path)] == [3, 3]
    report = report_of(tmp_path)
    assert (report["group_size"], report["privacy_unit"]) == (3, unit.name)
    assert report["epsilon"] == pytest.approx(for_all)
    assert trainer.epsilon is not None
    assert trainer.epsilon >= for_all
    assert (tmp_path / "publish" / "epsilon.png").stat().st_size > 0
    assert unit.name in (tmp_path / "publish" / "README.md").read_text()


@pytest.mark.parametrize("make", [dp_trainer, plain_trainer])
def test_a_training_set_that_names_people_is_refused_unless_its_unit_is_said(make: Any, tmp_path: Path) -> None:
    rows = [{**item, "user_id": "u"} for item in data()]
    with pytest.raises(InvalidArgument, match=r"^train_dataset: names users in user_id; give privacy_unit=ItemUnit"):
        make(tmp_path, train_dataset=rows)
    trainer = dp_trainer(tmp_path, train_dataset=rows, privacy_unit=ItemUnit())
    assert trainer.plan.unit == dp_trainer(tmp_path).plan.unit, "a checkpoint of the default unit resumes"
    assert dp_trainer(tmp_path, train_dataset=rows, privacy=privacy_arguments(disable_dp=True)).plan.privacy is None
    args = training_arguments(tmp_path, transformers.TrainingArguments)
    engine = PrivacyEngine(lora_llama(), args, rows, privacy_arguments(), privacy_unit="one row")
    assert engine.plan.unit == ItemUnit("one row")


def test_a_target_is_kept_for_the_whole_group(tmp_path: Path) -> None:
    unit, privacy = ItemUnit(group_size=2), privacy_arguments(target_epsilon=3.0, **SECRET)
    dp_trainer(tmp_path, privacy=privacy, privacy_unit=unit).train()
    assert 2.9 < report_of(tmp_path)["epsilon"] <= 3.0


def test_a_run_of_another_group_size_is_not_resumed(tmp_path: Path) -> None:
    crash(tmp_path, 1, privacy_unit=ItemUnit(group_size=2))
    with pytest.raises(InvalidArgument, match=r"group_size was 2 in the checkpoint and is absent now"):
        dp_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("clipping", "words"),
    [
        (PerLayer(), "per layer, equal shares"),
        (Automatic(gamma=0.1), "automatic"),
        (Adaptive(quantile=0.9, count_noise=2.0), "adaptive"),
    ],
)
def test_a_style_trains_and_is_resumed_with_its_clip_norm(clipping: Clipping, words: str, tmp_path: Path) -> None:
    whole, resumed = lora_llama(), lora_llama(1)
    dp_trainer(tmp_path / "whole", whole, clipping=clipping, **SAVING).train()
    crash(tmp_path / "crashed", 2, clipping=clipping)
    dp_trainer(tmp_path / "crashed", resumed, clipping=clipping, **SAVING).train(resume_from_checkpoint=True)
    assert torch.equal(parameters(whole), parameters(resumed))
    assert lines(tmp_path / "whole") == lines(tmp_path / "crashed")
    clip_norms = [line["clip_norm"] for line in lines(tmp_path / "whole")]
    assert clip_norms[0] == 0.5
    assert len(set(clip_norms)) == (4 if isinstance(clipping, Adaptive) else 1)
    assert report_of(tmp_path / "crashed")["clipping"].startswith(words)


def test_a_run_of_another_style_is_not_resumed(tmp_path: Path) -> None:
    crash(tmp_path, 1, clipping=Automatic())
    with pytest.raises(InvalidArgument, match=r"clipping was 'Automatic\(.*\)' in the checkpoint and is 'Flat\(\)'"):
        dp_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_dp_adam_knows_the_noise_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    update = DPAdam._update

    def note(self: DPAdam, parameter: Any, grad: Tensor, group: dict[str, Any]) -> None:
        seen.append((self._variance, group["weight_decay"]))
        update(self, parameter, grad, group)

    monkeypatch.setattr(DPAdam, "_update", note)
    model = lora_llama()
    before, trained = parameters(model), [p for p in model.parameters() if p.requires_grad]
    settings = {"dp_adam": True, "weight_decay": 0.25, "adam_beta1": 0.8, "learning_rate": 1e-3}
    trainer = dp_trainer(tmp_path, model, privacy=privacy_arguments(noise_multiplier=2.0), **settings)
    trainer.train()
    # The noise on the sum is 2 x 0.5, with the margin for rounding, and 6 examples are expected.
    assert [variance for variance, _ in seen] == pytest.approx(
        [(2.0 * 0.5 * (1 + ROUNDING) / 6) ** 2] * len(trained) * 2
    )
    assert {decay for _, decay in seen} == {0.25}
    assert trainer.optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    assert not torch.equal(before, parameters(model))


def test_without_dp_adam_the_optimizer_is_the_trainers(tmp_path: Path) -> None:
    assert type(dp_trainer(tmp_path).create_optimizer()) is torch.optim.SGD


class InTheMiddle(transformers.TrainerCallback):
    """Starts another run in the same folder while a step of the first is under way."""

    def __init__(self, folder: Path, **how: Any) -> None:
        self.folder, self.how, self.refusals = folder, how, list[str]()

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 1:
            with pytest.raises(InvalidArgument) as refused:
                dp_trainer(self.folder, lora_llama(), **SAVING).train(**self.how)
            self.refusals.append(str(refused.value))


@pytest.mark.parametrize("how", [{}, {"resume_from_checkpoint": True}], ids=["begun", "resumed"])
def test_two_runs_do_not_share_a_folder(how: dict[str, Any], tmp_path: Path) -> None:
    other = InTheMiddle(tmp_path, **how)
    dp_trainer(tmp_path, callbacks=[other], **SAVING).train()
    (refusal,) = other.refusals
    assert "another process is at work in it" in refusal
    assert len(lines(tmp_path)) == 4
    dp_trainer(tmp_path / "other", lora_llama(), max_steps=1).train()  # the lock is free, and one's own


def test_the_folder_is_free_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash(tmp_path, 1)
    dp_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert len(lines(tmp_path)) == 4
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish_run", lambda *_: pytest.fail("nothing was trained"))
        with pytest.raises(InvalidArgument, match="holds a run already"):
            dp_trainer(tmp_path, **SAVING).train()


def test_cut_draws_are_in_ledger_report_and_epsilon(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path, privacy=privacy_arguments(noise_multiplier=4.0, max_batch=8, **SECRET))
    trainer.train()
    assert [(line["max_batch"], line["num_examples"]) for line in lines(tmp_path)] == [(8, 12)] * 2
    setting = {"noise_multiplier": 4.0, "sampling_probability": 0.5, "steps": 2, "delta": 1e-3}
    report = report_of(tmp_path)
    assert (report["max_batch"], report["sampler"]) == (8, "Poisson, cut at 8 examples")
    assert report["epsilon"] == pytest.approx(accounting.epsilon(**setting, cut=accounting.Cut(8, 12)))
    assert report["epsilon"] > accounting.epsilon(**setting)
    with pytest.raises(InvalidArgument, match=r"^--max_batch=5: most draws would be cut"):
        _ = dp_trainer(tmp_path / "other", privacy=privacy_arguments(max_batch=5)).plan


def test_noise_bands_are_in_ledger_report_and_epsilon(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path, privacy=privacy_arguments(noise_multiplier=4.0, noise_bands="2", **SECRET))
    trainer.train()
    assert [(line["noise_bands"], line["block"]) for line in lines(tmp_path)] == [(2, 1)] * 2
    report = report_of(tmp_path)
    assert (report["noise_bands"], report["sampler"]) == (2, "Poisson, cyclic: 2 groups of examples take turns")
    turns = accounting.epsilon(noise_multiplier=4.0, sampling_probability=1.0, steps=1, delta=1e-3)
    assert report["epsilon"] == pytest.approx(turns)
    with pytest.raises(InvalidArgument, match=r"^--noise_bands=3: rows would be drawn with probability 1.5"):
        _ = dp_trainer(tmp_path / "other", privacy=privacy_arguments(noise_bands="3")).plan
