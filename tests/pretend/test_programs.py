"""What the programs do on an accelerator: train classifiers, evaluate, generate, save and resume, as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, Ledger
from dptune.integrations.peft import class_logits
from dptune.ledger import LEDGER_NAME
from dptune.run.checkpoint import load_checkpoint
from dptune.run.session import PrivateRun
from dptune.shapes import Shapes
from dptune.units.batches import AuthorDraw
from tests.classifiers import CLASSES, PAD, batch, classifier, rows, shake
from tests.dptune.integrations.runs import lora_llama
from tests.pretend.both import assert_close, flat, gradients, on_both
from tests.pretend.test_steps import step_of
from tests.pretend_device import counted, moved
from tests.tasks import STEPS, TinyTask, pace, plan
from tests.tasks import rows as rows_of_text
from tests.tiny import tiny_llama
from utils.classification.dataset import ClassificationDataset
from utils.classification.losses import ClassificationLoss, check_classifier_rules, predict
from utils.classification.mode_defaults import MODES
from utils.classification.modes import prepare_mode
from utils.cli.interruption import StopRequest
from utils.generation.arguments import SamplingArguments
from utils.generation.batches import make_jobs
from utils.generation.hf import GenerateBackend
from utils.models.loading import load_tokenizer
from utils.training.evaluation import held_out_loss
from utils.training.loop import TrainingLoop
from utils.training.micro_batches import MicroBatches
from utils.training.resume import Checkpoints, saved_run
from utils.training.views import with_token_dropout


@dataclass
class Launch:
    """A launch of one process on a device, as the training loop sees it: accelerate does not know this device."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    gather: Callable[[Tensor], Tensor] = field(default=lambda values: values)


def classifier_in(name: str, mode: str) -> Callable[[], nn.Module]:
    """A classifier in float32, prepared for a mode, away from its start."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model, _ = prepare_mode(classifier(name).float(), mode, lora_r=2, num_prepend_tokens=3)
        shake(model)
        return model.float().eval()

    return make


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in ("BERT", "Llama") for mode in MODES if (name, mode) != ("Llama", "bias-only")],
)
def test_each_mode_of_the_classifier(name: str, mode: str, tmp_path: Path) -> None:
    """The step's gradients, with noise, and its losses. Llama has no biases."""
    ids, labels = rows(5, seed=7)

    def run(model: nn.Module, device: torch.device) -> Tensor:
        inputs = {name: value.to(device) for name, value in batch(ids).items()}
        with step_of(model, tmp_path, clip_norm=1.0) as step:
            losses = ClassificationLoss(model)(labels=torch.tensor(labels, device=device), **inputs)
            stats = step.backward(losses)
            step.finish()
        return torch.cat([gradients(model), stats.norms.cpu(), stats.losses.cpu()])

    assert_close(*on_both(classifier_in(name, mode), run))


@pytest.mark.parametrize("mode", ["full", "prefix+lora"])
def test_the_check_of_a_classifier(mode: str) -> None:
    """It passes on both, having run the model on the device."""
    seen: list[torch.device] = []

    def run(model: nn.Module, device: torch.device) -> None:
        last = list(model.modules())[-1]
        with pytest.MonkeyPatch.context() as patch:
            forward = type(last).forward
            patch.setattr(
                type(last), "forward", lambda self, x, *rest: seen.append(x.device) or forward(self, x, *rest)
            )
            check_classifier_rules(model, num_classes=CLASSES, pad_token_id=PAD, token_types=False, max_length=9)
        assert {one.type for one in seen} == {device.type}
        seen.clear()

    on_both(classifier_in("BERT", mode), run)


def test_a_mode_is_prepared_on_the_device() -> None:
    """The test that a prefix is read runs the model, and restores the prefix."""

    def run(model: nn.Module, device: torch.device) -> Tensor:
        model, trained = prepare_mode(model, "prefix", num_prepend_tokens=3)
        assert all(model.get_parameter(name).device == device for name in trained if "classifier" in name)
        return torch.ones(1)

    on_both(lambda: classifier("BERT").float(), run)


def test_predictions_of_a_classifier() -> None:
    ids, labels = rows(12, seed=3)
    starts = np.cumsum([0, *map(len, ids)])
    data = ClassificationDataset(np.concatenate(ids).astype(np.int32), None, starts, np.array(labels), 0)

    def run(model: nn.Module, device: torch.device) -> tuple[np.ndarray, float]:
        launch: Any = Launch(device)
        micro_batches = MicroBatches(data, Shapes(16, 40), PAD, launch)
        return predict(lambda inputs: class_logits(model, inputs), data, micro_batches)

    (found, loss), (expected, expected_loss) = on_both(classifier_in("Llama", "full"), run)
    assert found.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1
    assert loss == pytest.approx(expected_loss, rel=1e-6)


def test_the_held_out_loss_of_a_language_model() -> None:
    def run(model: nn.Module, device: torch.device) -> float:
        launch: Any = Launch(device)
        data = rows_of_text()
        return held_out_loss(CausalLMLoss(model), data, MicroBatches(data, Shapes(64, 60), 0, launch))

    found, expected = on_both(lora_llama, run)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0}, {}, {"top_p": 0.9, "temperature": 0.7}, {"stop": ["e"]}, {"repetition_penalty": 1.3}],
    ids=["greedy", "sampled", "nucleus", "stopped", "penalised"],
)
def test_generated_texts(how: dict[str, Any], tiny_model_dir: Path) -> None:
    """Sampling on the device is seeded, and leaves both states of random numbers as they were."""
    tokenizer = load_tokenizer(str(tiny_model_dir))
    prompts = ["Abstract: ", "Hello, how are you?\n", "The cat sat on the mat. A dog ran over the hill.\n", "a\n\n"]

    def run(model: Any, device: torch.device) -> dict[int, str]:
        sampling = SamplingArguments("unused", max_length=40, batch_size=2, seed=5, **how)
        torch.manual_seed(2)
        before = states(device)
        drawing = GenerateBackend(model, tokenizer, sampling).draw(make_jobs(tokenizer, prompts, 40), ())
        texts = {job.index: drawn.text for finished in drawing for job, drawn in finished}
        assert all(map(torch.equal, states(device), before))
        return texts

    found, expected = on_both(lambda: tiny_llama(vocab_size=len(tokenizer)), run)
    assert found == expected
    assert any(expected.values())


def states(device: torch.device) -> list[Tensor]:
    """The states of random numbers of the CPU and of the device."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def the_loop(folder: Path, task: TinyTask, device: torch.device, *, step: int = 0, **planned: Any) -> TrainingLoop:
    """A run's loop from the beginning, or from the checkpoint after `step` steps."""
    folder.mkdir(exist_ok=True, parents=True)
    saved = load_checkpoint(folder / f"checkpoint-{step}") if step else None
    run = PrivateRun(plan(**planned), folder, resume_from=saved_run(saved, folder), identity=task.identity)
    launch: Any = Launch(device)
    micro_batches = MicroBatches(task.rows, Shapes(64, 60, drawn=1e6), 0, launch)
    return TrainingLoop(run, task, micro_batches, Checkpoints(run, {}, 2, None), pace())


@pytest.fixture(autouse=True)
def gathers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of one process need no group of processes."""
    monkeypatch.setattr("utils.training.micro_batches.gather_object", lambda values: values)


def trained_weights(folder: Path, model: nn.Module, device: torch.device, **how: Any) -> Tensor:
    """The trained weights after a run."""
    task, step = TinyTask(model=model), how.get("step", 0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loop = the_loop(folder, task, device, **how)
    loop.train(load_checkpoint(folder / f"checkpoint-{step}") if step else None)
    return flat(parameters)


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
def test_a_run_trains_saves_and_resumes(private: bool, tmp_path: Path) -> None:
    """With reproducible draws and noise. Adam divides by its moments, which enlarges differences of single bits."""

    def run(model: nn.Module, device: torch.device) -> Tensor:
        return trained_weights(tmp_path / device.type, model, device, private=private)

    found, expected = on_both(lora_llama, run)
    assert_close(found, expected, within=1e-5)
    kinds = [tmp_path / name for name in ("cpu", "pretend")]
    states = [load_checkpoint(folder / f"checkpoint-{STEPS}") for folder in kinds]
    assert_close(flat(states[1].weights.values()), flat(states[0].weights.values()), within=1e-5)
    assert all(one.device.type == "cpu" for one in states[1].weights.values())
    if private:
        assert Ledger(kinds[1] / LEDGER_NAME).steps == STEPS


@pytest.mark.parametrize("origin", ["cpu", "pretend"])
def test_a_checkpoint_is_resumed_on_another_kind_of_device(origin: str, tmp_path: Path, device: torch.device) -> None:
    """A run without privacy draws again what it drew, so the resumed one ends as the whole one does."""
    here = torch.device("cpu")
    whole = trained_weights(tmp_path, *placed(here if origin == "cpu" else device), private=False)
    for later in (device, here):
        resumed = trained_weights(tmp_path, *placed(later), step=2, private=False)
        assert_close(resumed, whole, within=1e-5)


def placed(device: torch.device) -> tuple[nn.Module, torch.device]:
    model = lora_llama()
    return (model if device.type == "cpu" else moved(model)), device


def test_running_out_of_memory_halves_the_micro_batches(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(torch.get_device_module(device), "empty_cache", lambda: freed.append(True), raising=False)
    model = moved(lora_llama())
    task = TinyTask(model=model)
    loop = the_loop(tmp_path, task, device)
    losses, failed = CausalLMLoss(model), []

    def failing(input_ids: Tensor, labels: Tensor) -> Tensor:
        if not failed and len(input_ids) > 1:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses(input_ids, labels)

    monkeypatch.setattr(TinyTask, "losses", property(lambda _: failing))
    loop.train(None)
    assert failed
    assert freed == [True]


def test_no_batch_is_waited_for(device: torch.device, tmp_path: Path) -> None:
    """Neither in training, for rows and for authors with weights, nor in an evaluation."""
    launch: Any = Launch(device)
    data, model = rows_of_text(), moved(lora_llama())
    micro_batches = MicroBatches(data, Shapes(64, 60, drawn=1e6), 0, launch)
    authors = AuthorDraw([np.array([0, 1]), np.array([2]), np.array([3, 4])], mean=True, most=2)
    seen: list[int] = []
    for number, draw in enumerate((np.arange(len(data)), authors)):
        (tmp_path / str(number)).mkdir()
        with step_of(model, tmp_path / str(number)) as step, counted() as counts:
            stats = micro_batches.run(draw, step, CausalLMLoss(model), StopRequest())
        assert stats is not None
        seen.append(len(stats))
        assert not [wait for wait in counts.by_wait if "copy from the host" in wait], counts.by_wait
    assert min(seen) > 1
    with counted() as counts:
        assert len([inputs for _, inputs in micro_batches.dealt(data, np.arange(len(data)))]) > 1
    assert not counts.waits, counts.by_wait


def test_views_with_token_dropout_wait_no_more_often(
    device: torch.device, tmp_path: Path, tiny_model_dir: Path
) -> None:
    launch: Any = Launch(device)
    data, model, tokenizer = rows_of_text(), moved(lora_llama()).train(), load_tokenizer(str(tiny_model_dir))
    plain = CausalLMLoss(model)
    replaced = with_token_dropout(plain, model, tokenizer, 0.3, device)
    micro_batches = MicroBatches(data, Shapes(64, 60, drawn=1e6, views=2), 0, launch)
    found = []
    for number, losses in enumerate((plain, replaced)):
        (tmp_path / str(number)).mkdir()
        with step_of(model, tmp_path / str(number)) as step, counted() as counts:
            assert micro_batches.run(np.arange(len(data)), step, losses, StopRequest())
        found.append(counts.waits)
        assert not [wait for wait in counts.by_wait if "copy from the host" in wait], counts.by_wait
    assert found[0] == found[1]
