"""A classifier's setup: what is planned and said of it, and its neighbours checked before a private step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertModel

from dptune import InvalidArgument
from dptune.averaging import NO_AVERAGE, Averaging
from dptune.lora import adapters, linear_layers
from tests.classifier_folders import save_bert, write_sst2
from tests.coupled_rows import couple_rows
from tests.scripts.test_train_classifier import NO_DROPOUT, flags
from utils.classification import setup as module
from utils.classification.arguments import CLASSIFIER_GROUPS, Settings
from utils.classification.files import load_classifier_tokenizer
from utils.classification.setup import (
    PlannedTask,
    describe_rates,
    describe_setup,
    describe_short_clip_norm,
    dtype_of_launch,
    identity_of,
    load_in_mode,
    load_tasks,
    load_trained,
    plan_task,
    run_task,
)
from utils.cli.flags import parse
from utils.cli.launch import make_accelerator
from utils.training.loop import End, Pace
from utils.training.optimizers import UpdateSettings

PRIVATE: dict[str, object] = {"finetune_mode": "lora", "enable_dp": True, "clip_norm": 1, "noise_multiplier": 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), **NO_DROPOUT)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def planned(bert: Path, glue: Path, tmp_path: Path) -> Any:
    """Plans the one task of a line: (plan, tokenizer, accelerator)."""

    def make(**changes: object) -> tuple[PlannedTask, Any, Any]:
        settings = Settings(*parse(*CLASSIFIER_GROUPS, args=flags(bert, glue, tmp_path / "out", **PRIVATE | changes)))
        tokenizer, accelerator = load_classifier_tokenizer(str(bert)), make_accelerator()
        (task,) = load_tasks(settings, tokenizer)
        return plan_task(task, settings, tokenizer, accelerator), tokenizer, accelerator

    return make


def test_the_logical_batch_is_the_flags_on_any_number_of_processes(planned: Any) -> None:
    plan = planned(num_train_epochs=3)[0].plan
    assert (plan.num_examples, plan.expected_batch_size, plan.steps) == (120, 24, 15)
    with pytest.raises(InvalidArgument, match=r"^--batch_size=121: sst2 has 120 training examples"):
        planned(batch_size=121)


def test_an_open_clip_norm_is_measured_once_for_plan_and_settings(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([2.5])
    monkeypatch.setattr(module, "measure_clip_norm", lambda _: next(measured))
    one = planned(clip_norm=None)[0]
    assert one.plan.privacy.clip_norm == one.settings.budget.clip_norm == 2.5


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


def test_the_start_is_the_seeds_and_the_identity_has_all_that_a_resumed_run_shares(planned: Any) -> None:
    one, other = (planned(seed=seed)[0] for seed in (1, 2))
    tokenizer = planned()[1]
    first, again, different = (load_in_mode(p.task, p.settings, tokenizer) for p in (one, one, other))
    weights = [torch.cat([p.flatten() for p in trained.model.parameters()]) for trained in (first, again, different)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    identity = identity_of(one, first)
    assert next(iter(identity)) == "finetune_mode", "a measured clip norm follows it"
    assert identity == identity_of(one, again)
    assert {"clip_norm", "training_data", "learning_rate", "steps", "seed", "checkpoint"} <= identity.keys()
    assert first.checkpoint == different.checkpoint, "what is new is not the checkpoint's"
    assert identity_of(other, different)["seed"] == 2


def test_an_average_reaches_the_run_and_what_a_resumed_run_shares(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[Pace] = []
    monkeypatch.setattr(module, "train", lambda *given: paces.append(given[4]) or End(1, None))
    for averaging, flag in ((NO_AVERAGE, {}), (Averaging(ema=0.9), {"ema": 0.9})):
        one, tokenizer, accelerator = planned(**flag)
        assert run_task(one, tokenizer, accelerator)
        assert paces[-1].averaging == averaging
        identity = identity_of(one, load_in_mode(one.task, one.settings, tokenizer))
        assert {name: identity[name] for name in identity.keys() & {"ema", "average_last"}} == flag


def test_one_checkpoint_is_not_of_several_tasks(bert: Path, glue: Path, tmp_path: Path) -> None:
    line = flags(bert, glue, tmp_path, datasets="sst2 qnli", resume_from_checkpoint="x")
    with pytest.raises(InvalidArgument, match=r"^--resume_from_checkpoint='x': belongs to one task"):
        load_tasks(Settings(*parse(*CLASSIFIER_GROUPS, args=line)), None)


@pytest.mark.parametrize(("typical", "warned"), [(1.9, False), (2.1, True)])
def test_a_clip_norm_far_below_the_gradients_is_said(typical: float, warned: bool) -> None:
    lines = describe_short_clip_norm(1.0, typical)
    assert len(lines) == warned
    assert all(line.startswith("warning: clip norm 1 is far below") for line in lines)


def test_rates_and_setup_are_told(planned: Any) -> None:
    updates = UpdateSettings("adamw", 0.01, 0.0, head_learning_rate=0.01)
    assert describe_rates(updates, chosen=True) == "learning rate          0.01"
    other = UpdateSettings("adamw", 0.01, 0.0, head_learning_rate=0.5)
    assert describe_rates(other, chosen=False).endswith("0.01 (default of this mode), 0.5 for the head")
    assert describe_setup(planned()[0].settings) == ["fine-tuning mode       lora"]


@pytest.mark.parametrize(("asked", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", None)])
def test_half_precision_launches_are_refused(asked: str, dtype: torch.dtype | None) -> None:
    """On a GPU: a CPU computes in float32 whatever is asked for."""
    launched: Any = SimpleNamespace(mixed_precision=asked, device=torch.device("cuda"))
    if dtype is not None:
        assert dtype_of_launch(launched) == dtype
        return
    with pytest.raises(InvalidArgument, match="mixed_precision='fp16': classifiers do not scale their losses"):
        dtype_of_launch(launched)


def test_a_token_without_an_embedding_is_refused_when_the_tasks_are_loaded(
    bert: Path, glue: Path, tmp_path: Path
) -> None:
    settings = Settings(*parse(*CLASSIFIER_GROUPS, args=flags(bert, glue, tmp_path / "out", **PRIVATE)))
    tokenizer = load_classifier_tokenizer(str(bert))
    size = len(BertModel.from_pretrained(bert).get_input_embeddings().weight)
    tokenizer.add_tokens([f"word{number}" for number in range(max(0, size - len(tokenizer)))])
    first = (glue / "SST-2" / "train.tsv").read_text().splitlines()[1]
    tokenizer.add_tokens([first.split("\t")[0]])
    with pytest.raises(
        InvalidArgument, match=r"--model_name_or_path=.*training row 1 .*has token \d+ .*but the model has"
    ):
        load_tasks(settings, tokenizer)


def test_a_validation_split_decides_only_if_it_is_declared_public(planned: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^--early_stopping_patience=2: the result would depend on the held-out"):
        planned(early_stopping_patience=2)
    decided = planned(early_stopping_patience=2, validation_is_public=True)
    task, tokenizer, _ = decided
    trained = load_in_mode(task.task, task.settings, tokenizer)
    assert identity_of(task, trained)["selection"] == {"patience": 2, "keep_best": False}
    assert "selection" not in identity_of(planned()[0], trained)


def test_all_linear_adapts_every_layer_of_the_encoder_and_not_the_head(planned: Any) -> None:
    task, tokenizer, _ = planned(lora_target_modules="all-linear", use_rslora=True, lora_r=4)
    trained = load_in_mode(task.task, task.settings, tokenizer)
    found = dict(adapters(trained.model))
    layers = {name for name in linear_layers(trained.model) if name.startswith("bert.")}
    assert set(found) == layers
    assert {adapter.scale for adapter in found.values()} == {16 * 2 / 4}
