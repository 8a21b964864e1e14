"""`DPTrainer` with weights sharded over two processes: it trains, evaluates, saves and resumes as one process does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dptune import InvalidArgument, Ledger
from dptune.integrations.transformers import DPTrainer
from dptune.ledger import LEDGER_NAME
from dptune.per_example import rules
from dptune.ranks import Ranks
from dptune.run import session
from dptune.run.checkpoint import load_checkpoint
from dptune.sharding import local_part, shard
from tests.dptune.integrations.runs import (
    Silent,
    data,
    dp_trainer,
    draws,
    expected_gradient,
    plain_trainer,
    privacy_arguments,
)
from tests.dptune.integrations.test_docs import PAGE
from tests.dptune.integrations.test_processes import as_launched
from tests.dptune.integrations.test_resume import Crash
from tests.processes import run_processes
from tests.tiny import tiny_tokenizer
from tests.whole_models import whole_model
from utils.models.sharded import decoder_layers

NAME = "Llama, tied"
STEPS = 3
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch", "average_last": 0.6},  # of steps 2 and 3, and checkpoints hold step 2
    "dp_adam": {"dp_adam": True},
    "plain": {"privacy": privacy_arguments(disable_dp=True), "max_steps": 2},
}
# Rows of one length: transformers weighs the rows of several processes otherwise than those of one.
EVALUATED = [{name: row[name][:8] for name in row} for row in data(12, seed=9) if len(row["input_ids"]) > 8][:4]
RESUMED: dict[str, Any] = {"dp_adam": True, "save_total_limit": 1, "ema": 0.5}


class FullGradients(transformers.TrainerCallback):
    """Keeps the gradient of every optimizer step: whole, and this rank's part of it."""

    def __init__(self) -> None:
        self.whole: list[Tensor] = []
        self.own: list[Tensor] = []

    def on_pre_optimizer_step(self, *_event: Any, model: Any = None, **_: Any) -> None:
        grads = [parameter.grad for parameter in model.parameters()]
        self.whole.append(torch.cat([whole(grad).flatten() for grad in grads]))
        self.own.append(torch.cat([local_part(grad).flatten().clone() for grad in grads]))


def whole(value: Any) -> Tensor:
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def model_of(*, sharded: bool = True) -> Any:
    model = whole_model(NAME)
    if sharded:
        shard(model.requires_grad_(False), decoder_layers(model), device=torch.device("cpu"))
        model.requires_grad_(True)
    return model


def trainer_of(folder: Path, model: Any, ranks: int = 2, **changed: Any) -> DPTrainer:
    """One row goes through the model at a time, so ranks have unequal numbers of them."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 6 // ranks,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_dataset": EVALUATED,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 2,
        "prediction_loss_only": True,
    }
    return dp_trainer(folder, model, **(settings | changed))


def trained(folder: Path, model: Any, ranks: int, **changed: Any) -> dict[str, Any]:
    log = FullGradients()
    trainer = trainer_of(folder, model, ranks, callbacks=[log], **changed)
    trainer.train()
    trainer.save_model()
    history = trainer.state.log_history
    return {
        "grads": torch.stack(log.whole),
        "weights": weights(model),
        "eval": [row["eval_loss"] for row in history if "eval_loss" in row] + [trainer.evaluate()["eval_loss"]],
        "loss": [row["loss"] for row in history if "loss" in row],
        "norm": [row["grad_norm"] for row in history if "loss" in row],
        "unwrapped": trainer.model_wrapped is model,
    }


def without_noise(folder: Path, ranks: int) -> dict[str, Any]:
    """What each of the runs ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "GaussianNoise", Silent)
        return {name: trained(folder / name, model_of(sharded=ranks > 1), ranks, **how) for name, how in RUNS.items()}


def _resumed(folder: Path) -> dict[str, Any]:
    """Weights of a run that went through, and of one that was stopped and resumed; both with noise.

    Also this rank's part of the first gradient, which the noise hides: it is at least 8 times as long.
    """
    straight, again, log = model_of(), model_of(), FullGradients()
    trainer_of(folder / "straight", straight, callbacks=[log], **RESUMED).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(folder / "stopped", model_of(), callbacks=[Crash(2)], **RESUMED).train()
    trainer_of(folder / "stopped", again, **RESUMED).train(resume_from_checkpoint=True)
    return {"straight": weights(straight), "again": weights(again), "noisy": log.own[0]}


def half_a_gradient(layer: nn.Linear, input: Tensor, grad: Tensor) -> Any:
    """A wrong rule."""
    return rules.linear(layer, input, grad / 2)


def _refused(rank: int, folder: Path) -> dict[str, str]:
    """What ends before the first step: one rank's wrong rule, and settings that do not go with shards."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setitem(rules._RULES, nn.Linear, half_a_gradient)
        with pytest.raises(InvalidArgument) as error:
            trainer_of(folder / "rule", model_of()).train()
        found["rule"] = str(error.value)
    model = model_of()
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    gathered = torch.optim.AdamW(model.parameters(), lr=0.1)
    for name, own in {"optim": {"optim": "adafactor"}, "optimizers": {"optimizers": (gathered, None)}}.items():
        with pytest.raises(InvalidArgument) as error:
            trainer_of(folder / name, model, **own).train()
        found[name] = str(error.value)
    adapters = model_of().requires_grad_(False)
    adapters.lm_head.added = nn.Linear(2, 2)
    for name, refused, own in (("best", model, {"load_best_model_at_end": True}), ("adapters", adapters, {})):
        with pytest.raises(InvalidArgument) as error:
            trainer_of(folder / name, refused, **own)
        found[name] = str(error.value)
    return found


def _work(rank: int, _gather: Any, folder: Path) -> dict[str, Any]:
    as_launched()
    return {
        "noiseless": without_noise(folder, 2),
        "resumed": _resumed(folder),
        "refused": _refused(rank, folder),
    }


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes, and what each of them saw."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_processes(2, _work, folder)


@pytest.fixture(scope="module")
def folder(launch: tuple[Path, Any]) -> Path:
    return launch[0]


@pytest.fixture(scope="module")
def launched(launch: tuple[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return launch[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of one process that holds the whole model."""
    return without_noise(tmp_path_factory.mktemp("one"), 1)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_shards_train_as_one_with_the_whole_model(
    name: str, launched: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    wanted = alone[name]
    for rank in launched:
        found = rank["noiseless"][name]
        torch.testing.assert_close(found["grads"], wanted["grads"], rtol=1e-6, atol=1e-8)
        assert_same(found["weights"], wanted["weights"])
        for logged in ("loss", "norm", "eval"):
            assert found[logged] == pytest.approx(wanted[logged], rel=1e-5), logged
        assert found["unwrapped"]


def test_the_noiseless_gradient_is_the_oracles(launched: list[dict[str, Any]]) -> None:
    wanted = expected_gradient(model_of(sharded=False), draws(1)[0])
    for rank in launched:
        torch.testing.assert_close(rank["noiseless"]["adamw"]["grads"][0], wanted, rtol=1e-6, atol=1e-8)


def test_each_rank_adds_noise_of_its_own_to_its_shards(launched: list[dict[str, Any]]) -> None:
    first, second = (rank["resumed"]["noisy"] for rank in launched)
    for own in (first, second):
        assert own.std().item() == pytest.approx(0.5 / 6, rel=0.05)
    size = min(len(first), len(second))
    assert size > 5_000
    assert abs(torch.corrcoef(torch.stack([first[:size], second[:size]]))[0, 1]) < 4 / size**0.5


def test_ledger_report_and_card_come_out_once(folder: Path) -> None:
    assert Ledger(folder / "adamw" / LEDGER_NAME).steps == STEPS
    assert json.loads((folder / "adamw" / "publish" / "privacy_report.json").read_text())["steps"] == STEPS
    assert (folder / "adamw" / "publish" / "README.md").read_text().count("base_model:") == 1


def test_the_saved_model_is_read_by_from_pretrained(launched: list[dict[str, Any]], folder: Path) -> None:
    wanted = launched[0]["noiseless"]["adamw"]["weights"]
    model, info = AutoModelForCausalLM.from_pretrained(folder / "adamw", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, wanted[name]) for name, value in model.named_parameters())


def test_a_checkpoint_holds_shards_of_every_rank_and_nothing_whole(folder: Path) -> None:
    checkpoint = folder / "adamw" / "checkpoint-2"
    files = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert {"__0_0.distcp", "__1_0.distcp", "manifest.json", LEDGER_NAME, "trainer_state.json"} <= files
    assert not [name for name in files if name.endswith((".safetensors", ".pth"))]
    saved = load_checkpoint(checkpoint)
    assert not saved.weights
    largest = max(value.numel() for own in saved.optimizer["state"].values() for value in own.values())  # type: ignore[attr-defined]
    assert largest == 1, "only the count of steps"
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert "trainer_state.json" in listed
    assert [path.name for path in (folder / "stopped").glob("checkpoint-*")] == ["checkpoint-3"], "--save_total_limit"


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(launched: list[dict[str, Any]], folder: Path) -> None:
    for rank in launched:
        straight, again = rank["resumed"]["straight"], rank["resumed"]["again"]
        assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert Ledger(folder / "stopped" / LEDGER_NAME).steps == STEPS


def resumed_alone(folder: Path, *, sharded: bool) -> dict[str, Tensor]:
    """Weights of a run of two processes that one process ends."""
    model = model_of(sharded=sharded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "GaussianNoise", Silent)
        checkpoint = str(folder / "checkpoint-2")
        trainer_of(folder, model, 1, **RUNS["adamw"]).train(resume_from_checkpoint=checkpoint)
    return weights(model)


def _run_as_printed(folder: Path) -> None:
    """The block about sharded weights in docs/how_to/trainer.md."""
    model_of(sharded=False).float().save_pretrained(folder / "start")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    imports = blocks[0].partition("args = ")[0]
    names = {"folder": folder / "start", "tokenizer": tiny_tokenizer(), "train_dataset": data()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(imports + blocks[1], names)


def _resumed_alone(_rank: int, _gather: Any, folder: Path) -> tuple[dict[str, Tensor], str]:
    """Also what the callback says to a sharded model."""
    as_launched()
    _run_as_printed(folder)
    with pytest.raises(InvalidArgument) as error:
        plain_trainer(folder / "callback", model_of())
    return resumed_alone(folder, sharded=True), str(error.value)


def test_another_number_of_processes_resumes_it(launched: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    wanted = launched[0]["noiseless"]["adamw"]["weights"]
    for name in ("sharded", "whole"):
        shutil.copytree(folder / "adamw", tmp_path / name)
    ((found, refused),) = run_processes(1, _resumed_alone, tmp_path / "sharded")
    assert_same(found, wanted)
    printed = tmp_path / "sharded" / "sharded"  # the block in docs/how_to/trainer.md
    assert json.loads((printed / "publish" / "privacy_report.json").read_text())["steps"] == 2
    assert {"checkpoint-2", "model.safetensors", "tokenizer.json"} <= {path.name for path in printed.iterdir()}
    assert refused == "model=LlamaForCausalLM: its weights are sharded, which only DPTrainer can train"
    assert_same(resumed_alone(tmp_path / "whole", sharded=False), wanted)
    assert Ledger(tmp_path / "whole" / LEDGER_NAME).steps == STEPS + 1, "the step that ran again counts"


def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "adamw", tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-2" / "shards" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InvalidArgument, match=r"^--resume_from_checkpoint=.*__1_0\.distcp is damaged"):
        resumed_alone(tmp_path / "run", sharded=False)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("rule", "differ from autograd's"),
        (
            "optim",
            r"^--optim=Adafactor: cannot train sharded weights; use one of Adam, AdamW, DPAdam, LowPassAdam, SGD$",
        ),
        ("optimizers", r"^optimizers=AdamW: was made after a forward pass"),
        ("best", r"^--load_best_model_at_end=True: the Trainer cannot read it into sharded weights"),
        ("adapters", r"^model=LlamaForCausalLM: trains adapters on sharded weights"),
    ],
)
def test_every_process_refuses_it_before_the_first_step(
    what: str, told: str, launched: list[dict[str, Any]], folder: Path
) -> None:
    first, second = (rank["refused"][what] for rank in launched)
    assert first == second
    assert re.search(told, first)
    ledger = folder / what / LEDGER_NAME
    assert not ledger.exists() or not Ledger(ledger).steps


def test_each_process_makes_as_many_passes_as_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would wait in a gather that the others do not make."""
    trainer = trainer_of(tmp_path, model_of(sharded=False), 1, eval_strategy="no")
    seen: list[list[int]] = []
    step = trainer.training_step

    def watch(model: Any, inputs: Any, *rest: Any) -> Any:
        ranks = Ranks(0, 2, gather=lambda own: torch.cat([own, own + 2]), broadcast=lambda value: value)
        with monkeypatch.context() as patch:
            patch.setattr(DPTrainer, "has_shards", True)
            patch.setattr(trainer._begun, "ranks", ranks)
            batches = trainer._in_step(inputs["micro_batches"])
        seen.append([len(batch.items) for batch in batches])
        return step(model, {**inputs, "micro_batches": batches}, *rest)

    trainer.training_step = watch  # type: ignore[method-assign]
    trainer.train()
    assert [own[-2:] for own in seen] == [[0, 0]] * STEPS
    assert all(all(own[:-2]) for own in seen)
