"""`DPTrainer` releases, evaluates and keeps an average of the weights, and trains as without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dptune import InvalidArgument, attach_adapter
from dptune.integrations.transformers import PrivacyEngine, TrainingArguments
from dptune.run.checkpoint import AVERAGE_NAME
from tests.dptune.integrations.runs import data, dp_trainer, lora_llama, privacy_arguments, training_arguments
from tests.tiny import tiny_llama

STEPS = 4
SAVING: dict[str, Any] = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_dataset": data(4, seed=9),
    "eval_strategy": "steps",
    "eval_steps": 1,
    "prediction_loss_only": True,
    "learning_rate": 1.0,
}
LAST = {"average_last": 0.75}  # steps 2 to 4


def flat(model: Any) -> Tensor:
    return torch.cat([own.detach().flatten() for name, own in model.named_parameters() if ".lora." in name]).clone()


class Watch(transformers.TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []

    def on_step_end(self, *_event: Any, model: Any = None, **_: Any) -> None:
        self.after.append(flat(model))


def trained(folder: Path, **changed: Any) -> tuple[Any, list[Tensor], list[float]]:
    """(the trainer, the weights after each step, the evaluated losses)."""
    watch = Watch()
    trainer = dp_trainer(folder, callbacks=[watch], **(SAVING | changed))
    trainer.train()
    return trainer, watch.after, [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]


def loss_of(weights: Tensor, folder: Path) -> float:
    """The loss on the same rows, of a model with these weights."""
    model, start = lora_llama(), 0
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data.copy_(weights[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
    found: float = dp_trainer(folder, model, **SAVING).evaluate()["eval_loss"]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder of a run without an average and of one with it, and both."""
    folder = tmp_path_factory.mktemp("averages")
    return folder, trained(folder / "plain"), trained(folder / "last", **LAST)


def test_it_trains_at_the_weights_and_evaluates_and_releases_their_average(
    runs: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder, (_, plain, _), (trainer, after, losses) = runs
    assert all(torch.equal(*pair) for pair in zip(after, plain, strict=True))
    means = [after[0], after[1], *(torch.stack(after[1:end]).double().mean(0).float() for end in (3, 4))]
    torch.testing.assert_close(flat(trainer.model), means[-1])
    wanted = [loss_of(one, tmp_path) for one in means]
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert losses[-1] != pytest.approx(loss_of(after[-1], tmp_path), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted[-1], rel=1e-5), "after training too"
    published = tiny_llama(0, layers=1)
    attach_adapter(published, folder / "last" / "publish" / "lora_weights.bin")
    torch.testing.assert_close(flat(published), flat(trainer.model))


def test_report_and_card_say_so(runs: tuple[Path, Any, Any]) -> None:
    folder = runs[0]
    reports = [
        json.loads((folder / name / "publish" / "privacy_report.json").read_text()) for name in ("plain", "last")
    ]
    assert [report["average"] for report in reports] == [None, "mean of the weights after steps 2 to 4"]
    assert reports[0]["epsilon"] == reports[1]["epsilon"]
    card = (folder / "last" / "publish" / "README.md").read_text()
    assert "| Released weights | mean of the weights after steps 2 to 4 |" in card
    plain = (folder / "plain" / "publish" / "README.md").read_text()
    assert "Released weights" not in plain


def test_the_recipe_names_the_average(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path, privacy=privacy_arguments(insecure_test_seed=None), **LAST)
    assert "--average_last 0.75" in str(trainer._card.recipe)
    assert "ema" not in str(trainer._card.recipe)


@pytest.mark.parametrize("average", [{}, {"ema": 0.5}])
def test_the_best_model_is_the_one_that_was_evaluated(average: dict[str, float], tmp_path: Path) -> None:
    """The rate is so large that the last steps are worse, and the best one has an average of two."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 10.0}
    privacy = privacy_arguments(validation_is_public=True)
    trainer, _, losses = trained(tmp_path / "run", privacy=privacy, **(best | average))
    assert trainer.state.best_metric == min(losses) < losses[-1]
    assert min(losses) == losses[1] or not average
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_checkpoint_whose_average_is_lost_damaged_or_of_another_model_is_refused(
    runs: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    shutil.copytree(runs[0] / "last", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint-1" / AVERAGE_NAME).exists(), "before the average begins"
    file = tmp_path / "run" / "checkpoint-3" / AVERAGE_NAME
    found = torch.load(file)
    assert found["count"] == 2
    other = {"count": 2, "tensors": {name: tensor[..., :1] for name, tensor in found["tensors"].items()}}
    torch.save(other, file)
    refused = {
        "is of another model: it has no .* of that shape": None,
        "is no readable average": b"?",
        "over 0": b"",
    }
    for told, content in refused.items():
        if content is not None:
            file.write_bytes(content)
        if content == b"":
            file.unlink()
        trainer = dp_trainer(tmp_path / "run", **SAVING, **LAST)
        with pytest.raises(InvalidArgument, match=told):
            trainer.train(resume_from_checkpoint=str(file.parent))


def test_another_average_is_not_resumed(runs: tuple[Path, Any, Any], tmp_path: Path) -> None:
    shutil.copytree(runs[0] / "last", tmp_path / "run")
    trainer = dp_trainer(tmp_path / "run", **SAVING, ema=0.5)
    with pytest.raises(InvalidArgument, match=r"ema was absent in the checkpoint and is 0\.5 now"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ema": 1.0}, "^--ema=1.0: give a decay above 0 and below 1"),
        ({"ema": 0.9, "average_last": 0.5}, "^--average_last=0.5: ema 0.9 already asks for an exp"),
    ],
)
def test_mistakes_name_the_flag(given: dict[str, float], told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=told):
        dp_trainer(tmp_path, **given)


def test_the_callback_has_no_average(tmp_path: Path) -> None:
    args = training_arguments(tmp_path, TrainingArguments, ema=0.9)
    with pytest.raises(InvalidArgument, match=r"^--ema=0\.9: a plain Trainer evaluates and saves the last weights"):
        PrivacyEngine(lora_llama(), args, data(), privacy_arguments())
