"""Canaries take part in a training as their coins say, stay the same when it resumes, and are scored at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_clm
from dptune import InvalidArgument, Parts
from dptune.audit.__main__ import main as audit
from dptune.audit.training import Canaries, read_canaries, write_canaries
from dptune.losses import CausalLMLoss
from dptune.report.check import check_publishable
from dptune.units.unit import group_by_author
from tests.scripts.test_train_clm import flags
from tests.tasks import rows
from tests.tiny import tiny_llama, tiny_tokenizer
from utils.cli.flags import parse
from utils.cli.launch import Sharding
from utils.data.tokenization import IGNORED, TokenizedDataset
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups
from utils.training.canaries import LOSS_SCORE, begin, canaries_of_run, finish_canaries, measured, with_canaries
from utils.training.causal_lm import data as causal_lm_data
from utils.training.without_tokens import count

CPU = torch.device("cpu")
COUNT, TOKENS = 20, list(range(5, 300))


def some(folder: Path, **how: Any) -> Canaries:
    return canaries_of_run(COUNT, folder, TOKENS, 12, **({"resumed": False} | how))


def test_canaries_are_random_rows_with_fair_coins(tmp_path: Path) -> None:
    ones, others = some(tmp_path), some(tmp_path)
    assert ones.ids is not None
    assert others.ids is not None
    assert ones.ids.shape == (COUNT, 12)
    assert set(ones.ids.ravel()) <= set(TOKENS)
    assert (ones.ids != others.ids).any()
    coins = np.concatenate([canaries_of_run(1000, tmp_path, TOKENS, 2, resumed=False).included for _ in range(4)])
    assert 0.4 < coins.mean() < 0.6
    assert not list(tmp_path.iterdir())


def test_only_canaries_that_are_in_have_tokens_to_learn(tmp_path: Path) -> None:
    canaries, train = some(tmp_path), rows(7)
    both = with_canaries(train, canaries)
    assert len(both) == 7 + COUNT
    for number in range(7):
        for name, value in train.batch([number], 0).items():
            assert torch.equal(both.batch([number], 0)[name], value)
    batch = both.batch(np.arange(7, 7 + COUNT), 0)
    assert canaries.ids is not None
    assert (batch["input_ids"].numpy() == canaries.ids).all()
    learned = batch["labels"].ne(IGNORED).numpy()
    assert (learned.sum(1) == np.where(canaries.included, 11, 0)).all()
    assert both.fingerprint() != with_canaries(train, some(tmp_path)).fingerprint()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"authors": group_by_author([1] * 7)}, "--privacy_unit"),
        ({"parts": Parts((7,), (1.0,))}, "--train_file_weights"),
    ],
)
def test_units_other_than_rows_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    train = rows(7)
    other = TokenizedDataset(train.ids, train.is_answer, train.starts, 0, **changes)
    with pytest.raises(InvalidArgument, match=f"--audit_canaries=20: .*leave {told} out"):
        with_canaries(other, some(tmp_path))


def test_scores_are_by_how_much_the_losses_fell(tmp_path: Path) -> None:
    canaries, model = some(tmp_path), tiny_llama().train()
    losses = CausalLMLoss(model)
    begin(tmp_path, canaries, model, losses, CPU)
    kept = some(tmp_path, resumed=True)
    assert kept.before is not None
    ids = torch.from_numpy(np.asarray(canaries.ids)).long()
    with torch.no_grad():
        alone = [float(losses(ids[row : row + 1], ids[row : row + 1])) for row in range(COUNT)]
    assert kept.before == pytest.approx(alone, rel=1e-4)
    begin(tmp_path, kept, tiny_llama(seed=1), losses, CPU)
    assert (some(tmp_path, resumed=True).before == kept.before).all(), "the losses of the start are kept"
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    finish_canaries(tmp_path, model, losses, CPU)
    found = read_canaries(tmp_path / "audit" / "canaries.json")
    assert found.scores[LOSS_SCORE] == pytest.approx(kept.before - measured(canaries, model, losses, CPU))
    assert (found.included == canaries.included).all()
    assert model.training


def test_a_resumed_run_needs_its_canaries(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"canaries.json': cannot be read"):
        some(tmp_path, resumed=True)
    path = tmp_path / "audit" / "canaries.json"
    write_canaries(path, some(tmp_path))
    with pytest.raises(
        InvalidArgument, match=r"--audit_canaries='.*canaries\.json': has no tokens or losses of the start"
    ):
        some(tmp_path, resumed=True)
    with pytest.raises(InvalidArgument, match="--audit_canaries=30: the run began with 20 canaries"):
        canaries_of_run(30, tmp_path, TOKENS, 12, resumed=True)
    with pytest.raises(InvalidArgument, match="has no losses of the start"):
        finish_canaries(tmp_path, tiny_llama(), CausalLMLoss(tiny_llama()), CPU)


def test_a_plan_without_data_counts_them(tmp_path: Path) -> None:
    given = flags(tmp_path, tmp_path, tmp_path / "out", train_file=None, num_examples=500, audit_canaries=30)
    assert count(Groups(*parse(*CAUSAL_LM_GROUPS, args=given))) == 530


def test_sharded_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm_data, "sharding_of_launch", Sharding)
    folder: Any = None
    with pytest.raises(InvalidArgument, match="--audit_canaries=30: are scored on one process"):
        causal_lm_data.canaries_of(30, tiny_tokenizer(), folder, 12)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(the flags of a finished run with canaries, its folder)."""
    folder = tmp_path_factory.mktemp("canaries")
    data = folder / "rows.jsonl"
    data.write_text('{"instruction": "Say a word.", "answer": "word end"}\n' * 40)
    given = flags(tiny_model_dir, data, folder / "out", num_train_epochs=None, max_train_steps=2, audit_canaries=24)
    train_clm.main(given)
    return given, folder / "out"


def test_a_training_with_canaries_can_be_audited(trained: tuple[list[str], Path], tmp_path: Path) -> None:
    _, out = trained
    report = json.loads((out / "publish" / "privacy_report.json").read_text())
    assert report["num_examples"] == 40 + 24
    assert read_canaries(out / "audit" / "canaries.json").scores[LOSS_SCORE].shape == (24,)
    audit(["training", str(out), "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "audit.json").read_text())["stated_epsilon"] == report["epsilon"]


def test_a_training_with_canaries_is_not_published(trained: tuple[list[str], Path]) -> None:
    with pytest.raises(InvalidArgument, match="was trained with 24 canaries, for an audit; train again without"):
        check_publishable(trained[1] / "publish")


def test_a_resumed_training_keeps_its_canaries(trained: tuple[list[str], Path]) -> None:
    given, out = trained
    path = out / "audit" / "canaries.json"
    before = read_canaries(path)
    train_clm.main([*given, "--resume_from_checkpoint", "latest"])
    after = read_canaries(path)
    assert (after.included == before.included).all()
    assert np.array_equal(after.ids, before.ids)
    assert after.scores[LOSS_SCORE] == pytest.approx(before.scores[LOSS_SCORE], abs=1e-5)
    other = [word if word != "24" else "32" for word in given]
    with pytest.raises(SystemExit):
        train_clm.main([*other, "--resume_from_checkpoint", "latest"])
    assert np.array_equal(read_canaries(path).ids, before.ids)
