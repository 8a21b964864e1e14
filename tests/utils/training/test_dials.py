"""A dial's released gradient tells its coin as well as the mechanism allows, and changes nothing else of a training."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_clm
from benchmarks.audit_faults import less_noise
from dptune import CausalLMLoss, InvalidArgument, Ledger, Parts, PrivacyConfig
from dptune.audit.__main__ import main as audit
from dptune.audit.bounds import likelihood_ratios
from dptune.audit.checks import Finding
from dptune.audit.training import Canaries, audit_training, read_canaries
from dptune.audit.turn_ratios import TurnRatios
from dptune.clipping_styles import FLAT, Adaptive, Automatic, Clipping, PerLayer
from dptune.lora import trainable_parameters
from dptune.report.check import check_publishable
from dptune.run.plan import make_plan
from dptune.run.session import PrivateRun
from dptune.run.settings import PrivacySettings
from dptune.shapes import Shapes
from dptune.step import PrivateStep
from dptune.units.unit import group_by_author
from tests.dptune.integrations.runs import lora_llama
from tests.scripts.test_train_clm import flags
from tests.tasks import TinyTask, pace, rows
from utils.cli.flags import parse
from utils.cli.launch import Sharding, make_accelerator
from utils.data.tokenization import NO_DIAL, TokenizedDataset
from utils.models.trainable import Losses
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups
from utils.training.causal_lm import data as causal_lm_data
from utils.training.dials import (
    DIAL_SCORE,
    DialLosses,
    DialScores,
    attach_dials,
    detach_dials,
    dials_of_run,
    require_worst_case,
    with_dials,
)
from utils.training.loop import TrainingLoop
from utils.training.micro_batches import MicroBatches
from utils.training.resume import Checkpoints
from utils.training.without_tokens import count

CPU, COUNT, CLIP_NORM = torch.device("cpu"), 20, 0.5
COINS = Canaries(np.arange(COUNT) % 3 == 0, {})


def test_new_coins_are_fair_and_nothing_is_written(tmp_path: Path) -> None:
    one, other = (dials_of_run(2000, tmp_path, resumed=False) for _ in range(2))
    assert 0.43 < one.included.mean() < 0.57
    assert (one.included != other.included).any()
    assert not list(tmp_path.iterdir())


def test_each_dial_has_a_row_that_learns_no_token() -> None:
    train = rows(7)
    both = with_dials(train, COINS)
    assert len(both) == 7 + COUNT
    assert both.lengths[7:].tolist() == [2] * COUNT
    assert not both.num_answer_tokens[7:].any()
    batch = both.batch(np.arange(7 + COUNT), 0)
    assert batch["dials"].shape == (7 + COUNT, 1)
    assert batch["dials"][:7].eq(NO_DIAL).all()
    expected = np.where(COINS.included, np.arange(COUNT), NO_DIAL)
    assert batch["dials"][7:, 0].tolist() == expected.tolist()
    assert both.batch([], 0)["dials"].tolist() == [[NO_DIAL]]
    assert both.fingerprint() != with_dials(train, Canaries(~COINS.included, {})).fingerprint()


@pytest.mark.parametrize("clipping", [FLAT, Automatic()])
def test_a_released_gradient_is_the_clip_norm_along_the_dials_that_are_in(clipping: Clipping, tmp_path: Path) -> None:
    def released(train: TokenizedDataset, folder: str, dials: int = 0) -> dict[str, torch.Tensor]:
        model = lora_llama()
        losses: Losses = CausalLMLoss(model)
        if dials:
            losses = DialLosses(losses, attach_dials(model, dials, CPU), CLIP_NORM)
        config = PrivacyConfig(
            **{"clip_norm": CLIP_NORM, "noise_multiplier": 1.0, "num_examples": len(rows()) + COUNT},
            **{"expected_batch_size": 8.0, "steps": 1, "delta": 1e-3, "clipping": clipping},
        )
        with less_noise(0.0), PrivateStep(model, config, ledger=Ledger(tmp_path / folder)) as step:
            step.backward(losses(**train.batch(np.arange(len(train)), 0)))
            step.finish()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    found = released(with_dials(rows(), COINS), "with", COUNT)
    along = found.pop("audit_dials.weight")[:, 0] * 8 / CLIP_NORM
    torch.testing.assert_close(along, torch.from_numpy(COINS.included).float(), rtol=0, atol=1e-4)
    alone = released(rows(), "without")
    assert found.keys() == alone.keys()
    for name, grad in alone.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def test_scores_add_up_and_go_on_after_a_restart(tmp_path: Path) -> None:
    plan = make_plan(PrivacySettings(clip_norm=CLIP_NORM, noise_multiplier=0.8), num_examples=50, batch=10, steps=9)
    config, dials = plan.privacy, attach_dials(torch.nn.Module(), COUNT, CPU)
    assert config is not None
    generator = np.random.default_rng(0)
    seen = generator.normal(size=(2, COUNT))
    for number, one in enumerate(seen):
        kept = COINS if number == 0 else dials_of_run(COUNT, tmp_path, resumed=True)
        scores = DialScores(tmp_path, kept, dials, config, is_main=True)
        scores.begin()
        dials.weight.grad = torch.from_numpy(one[:, None] * CLIP_NORM / 10).float()
        scores()
        assert dials.weight.grad is None
    found = read_canaries(tmp_path / "audit" / "dials.json")
    assert (found.included == COINS.included).all()
    expected = likelihood_ratios(seen, noise_multiplier=0.8, sampling_probability=0.2).sum(0)
    assert found.scores[DIAL_SCORE] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    with pytest.raises(RuntimeError, match="no gradient: score each step before its update"):
        scores()
    with pytest.raises(InvalidArgument, match="--audit_dials=40: the run began with 20 canaries"):
        dials_of_run(40, tmp_path, resumed=True)


def test_scores_know_the_noise_bands(tmp_path: Path) -> None:
    settings = PrivacySettings(clip_norm=CLIP_NORM, noise_multiplier=0.8, noise_bands=3)
    plan = make_plan(settings, num_examples=50, batch=10, steps=9)
    config, dials = plan.privacy, attach_dials(torch.nn.Module(), COUNT, CPU)
    assert config is not None
    scores = DialScores(tmp_path, COINS, dials, config, is_main=True)
    exact = TurnRatios(config.bands, noise_multiplier=0.8, sampling_probability=0.2, count=COUNT)
    for seen in np.random.default_rng(0).normal(size=(5, COUNT)):
        dials.weight.grad = torch.from_numpy(seen[:, None] * CLIP_NORM / 10).float()
        scores.begin()
        scores()
        expected = exact.add(seen)
    found = read_canaries(tmp_path / "audit" / "dials.json")
    assert found.scores[DIAL_SCORE] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_another_process_scores_nothing_but_keeps_the_gradient_from_its_optimizer_too(tmp_path: Path) -> None:
    plan = make_plan(PrivacySettings(clip_norm=1.0, noise_multiplier=0.8), num_examples=50, batch=10, steps=9)
    assert plan.privacy is not None
    dials = attach_dials(torch.nn.Module(), COUNT, CPU)
    scores = DialScores(tmp_path, COINS, dials, plan.privacy, is_main=False)
    scores.begin()
    dials.weight.grad = torch.zeros(COUNT, 1)
    scores()
    assert dials.weight.grad is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"authors": group_by_author([1] * 7)}, "--privacy_unit"),
        ({"parts": Parts((7,), (1.0,))}, "--train_file_weights"),
    ],
)
def test_units_other_than_rows_are_refused(changes: dict[str, Any], told: str) -> None:
    train = rows(7)
    other = TokenizedDataset(train.ids, train.is_answer, train.starts, 0, **changes)
    with pytest.raises(InvalidArgument, match=f"--audit_dials=20: .*leave {told} out"):
        with_dials(other, COINS)


def test_clipping_that_splits_or_moves_the_clip_norm_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    require_worst_case(COUNT, FLAT)
    require_worst_case(COUNT, Automatic())
    for clipping in (PerLayer({"a": 1.0}), Adaptive()):
        with pytest.raises(InvalidArgument, match="--audit_dials=20: dials need one clip norm for all layers and step"):
            require_worst_case(COUNT, clipping)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "Say a word.", "answer": "word end"}\n' * 40)
    with pytest.raises(SystemExit):
        train_clm.main(flags(tiny_model_dir, data, tmp_path / "out", audit_dials=20, clipping="per-layer"))
    assert not (tmp_path / "out").exists()


def test_sharded_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm_data, "sharding_of_launch", Sharding)
    folder: Any = None
    with pytest.raises(InvalidArgument, match="--audit_dials=30: are scored on one process"):
        causal_lm_data.dials_of(30, folder)


def test_a_plan_without_data_counts_them(tmp_path: Path) -> None:
    given = flags(tmp_path, tmp_path, tmp_path / "out", train_file=None, num_examples=500, audit_dials=30)
    assert count(Groups(*parse(*CAUSAL_LM_GROUPS, args=given))) == 530


@dataclass
class _DialTask(TinyTask):
    """A tiny task with dials."""

    coins: Canaries = COINS
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        self.rows = with_dials(rows(), self.coins)
        self.dials = attach_dials(self.model, len(self.coins.included), CPU)

    @property
    def losses(self) -> Losses:
        return DialLosses(CausalLMLoss(self.model), self.dials, self.clip_norm)


_DIALS, _STEPS, _DELTA = 700, 8, 1e-6


def played(folder: Path, sigma: float, fault: AbstractContextManager[Any]) -> list[Finding]:
    """What the audit of a short training with many dials finds, with a fault in it."""
    coins = np.random.default_rng(1).integers(0, 2, _DIALS).astype(bool)
    task = _DialTask(coins=Canaries(coins, {}))
    settings = PrivacySettings(clip_norm=1.0, noise_multiplier=sigma, delta=_DELTA)
    total = len(task.rows)
    plan = make_plan(settings, num_examples=total, batch=0.9 * total, steps=_STEPS, test_seed=1)
    assert plan.privacy is not None
    scores = DialScores(folder, task.coins, task.dials, plan.privacy, is_main=True)
    batches = MicroBatches(task.rows, Shapes(64, 2000, drawn=1e6), 0, make_accelerator())
    with fault:
        run = PrivateRun(plan, folder)
        how = pace(eval_freq=1000, eval_at_start=False, after_release=scores)
        TrainingLoop(run, task, batches, Checkpoints(run, {}, 0, None), how).train(None)
    assert not task.dials.weight.any()
    found = read_canaries(folder / "audit" / "dials.json")
    return audit_training([found], Ledger(folder / "ledger.jsonl").spends, delta=_DELTA)


def test_with_the_true_noise_the_bound_is_a_share_of_what_is_stated(tmp_path: Path) -> None:
    plain, by_mu, by_curve = played(tmp_path, 2.0, nullcontext())
    assert 5 < plain.stated < 8
    assert 0.2 * plain.stated < plain.found < plain.stated
    assert plain.found < by_mu.found < plain.stated
    assert not by_curve.contradicted


@pytest.mark.parametrize("factor", [0.25, 0.0])
def test_with_less_noise_the_bound_is_above_what_is_stated(factor: float, tmp_path: Path) -> None:
    plain, _, by_curve = played(tmp_path, 4.0, less_noise(factor))
    assert 2.5 < plain.stated < 4
    assert plain.found > plain.stated
    assert plain.contradicted
    assert by_curve.contradicted


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(the flags of a finished run of the whole model with canaries of both kinds, its folder)."""
    folder = tmp_path_factory.mktemp("dials")
    data = folder / "rows.jsonl"
    data.write_text('{"instruction": "Say a word.", "answer": "word end"}\n' * 40)
    given = flags(
        *(tiny_model_dir, data, folder / "out"),
        **{"num_train_epochs": None, "max_train_steps": 3, "audit_canaries": 24, "audit_dials": 32},
        **{"trainable": "all", "checkpointing_steps": 1, "lora_r": None},
    )
    train_clm.main(given)
    return given, folder / "out"


def test_both_adversaries_are_judged(trained: tuple[list[str], Path], tmp_path: Path) -> None:
    out = trained[1]
    report = json.loads((out / "publish" / "privacy_report.json").read_text())
    assert report["num_examples"] == 40 + 24 + 32
    audit(["training", str(out), "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "audit.json").read_text())
    asked = [one["question"] for one in found["findings"]]
    assert len(asked) == 6
    assert "one training, loss of the finished model" in asked
    assert f"one training, {DIAL_SCORE}" in asked
    page = (tmp_path / "audit.md").read_text()
    assert DIAL_SCORE in page


def test_dials_are_not_saved_and_the_run_is_not_published(trained: tuple[list[str], Path]) -> None:
    publish = trained[1] / "publish"
    names = load_file(publish / "model.safetensors").keys()
    assert names
    assert not [name for name in names if "dial" in name]
    with pytest.raises(InvalidArgument, match="was trained with 56 canaries, for an audit"):
        check_publishable(publish)


def test_a_resumed_training_keeps_its_coins_and_counts_every_release(trained: tuple[list[str], Path]) -> None:
    given, out = trained
    path = out / "audit" / "dials.json"
    before = read_canaries(path)
    train_clm.main([*given, "--resume_from_checkpoint", str(out / "checkpoint-2")])
    after = read_canaries(path)
    assert (after.included == before.included).all()
    assert Ledger(out / "ledger.jsonl").steps > 3
    assert (after.scores[DIAL_SCORE] != before.scores[DIAL_SCORE]).any()
    other = [word if word != "32" else "40" for word in given]
    with pytest.raises(SystemExit):
        train_clm.main([*other, "--resume_from_checkpoint", "latest"])
    assert (read_canaries(path).scores[DIAL_SCORE] == after.scores[DIAL_SCORE]).all()


def test_detaching_leaves_the_model_as_it_was() -> None:
    model = lora_llama()
    before = len(trainable_parameters(model))
    attach_dials(model, COUNT, CPU)
    assert len(trainable_parameters(model)) == before + 1
    detach_dials(model)
    detach_dials(model)
    assert len(trainable_parameters(model)) == before
