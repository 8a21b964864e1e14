"""A job's model: its neighbours are checked before a private step, and it starts as the flags say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

import train_clm
from dptune import InvalidArgument
from dptune.lora import adapters
from dptune.report.card import LORA_ADAPTER, WHOLE_MODEL
from tests.coupled_rows import couple_rows
from tests.scripts.test_train_clm import flags
from tests.utils.training.causal_lm.jobs import WITHOUT_PRIVACY, in_float16
from utils.training.causal_lm import job as job_module
from utils.training.causal_lm import load
from utils.training.causal_lm.load import load_causal_lm


@pytest.mark.parametrize("tokens", [None, 48, 20])
@pytest.mark.parametrize("private", [True, False])
def test_rows_that_reach_each_other_are_refused_before_a_private_run(
    private: bool, tokens: int | None, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they do so only if a row has --block_size tokens, and where a step takes one such row at a time."""
    couple_rows(monkeypatch, LlamaModel, width=48)
    budget = {} if tokens is None else {"max_tokens_per_device": tokens}
    planned = job(**budget | ({} if private else WITHOUT_PRIVACY))
    if not private:
        assert load_causal_lm(planned).model is not None
        return
    with pytest.raises(InvalidArgument, match="per-example gradients differ from autograd's"):
        load_causal_lm(planned)


def test_a_check_that_does_not_fit_in_memory_is_told_in_one_line(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load, "check_rules", full)
    with pytest.raises(InvalidArgument, match=r"^block_size=48: out of memory on two random rows .*; lower it"):
        load_causal_lm(job())


def test_an_adapter_starts_as_the_seed_says_and_a_whole_model_is_float32(job: Any) -> None:
    one, same, other = (load_causal_lm(job(lora_target_modules="q_proj", seed=seed)) for seed in (5, 5, 6))
    starts = [next(adapters(task.model))[1].A.weight for task in (one, same, other)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert (one.trained, one.artifact) == (None, LORA_ADAPTER)
    whole = load_causal_lm(job(trainable="norms", lora_r=None))
    assert whole.artifact == WHOLE_MODEL
    assert whole.trained == [name for name, p in whole.model.named_parameters() if p.requires_grad]
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}


def test_a_whole_model_that_overflows_in_float16_is_refused_before_its_first_step(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float16(monkeypatch)
    planned = job(trainable="all", lora_r=None)
    monkeypatch.setattr(job_module, "loss_scale", lambda *_, **__: 2.0**24)
    with pytest.raises(InvalidArgument, match="its gradients overflow or vanish in lower precision"):
        load_causal_lm(planned)
    assert not (tmp_path / "out" / "ledger.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused(job: Any) -> None:
    planned = job()
    identity = load_causal_lm(planned).identity
    saved = type("Saved", (), {"identity": identity | {"base_model": "another"}})
    folder = dataclasses.replace(planned.folder, saved=saved)
    with pytest.raises(InvalidArgument, match="base_model was 'another' in the checkpoint"):
        load_causal_lm(dataclasses.replace(planned, folder=folder))


def test_attention_is_that_of_the_flag(job: Any) -> None:
    assert load_causal_lm(job(attn_implementation="eager")).model.config._attn_implementation == "eager"


SHORT = {"max_train_steps": 2, "num_train_epochs": None, "checkpointing_steps": 1}


@pytest.fixture
def earlier(job: Any, tiny_model_dir: Path, tmp_path: Path, no_plots: None) -> Path:  # noqa: ARG001  # makes the rows
    """The folder of a private run that left an rsLoRA adapter on every linear layer."""
    given = SHORT | {"lora_r": 2, "lora_target_modules": "all-linear", "use_rslora": True}
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "earlier", **given))
    return tmp_path / "earlier"


def test_training_goes_on_from_an_adapter_and_its_report_is_carried_on(
    job: Any, earlier: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = SHORT | {"lora_r": None, "initial_adapter": earlier}
    task = load_causal_lm(job(**start))
    kept = torch.load(earlier / "publish" / "lora_weights.bin", weights_only=True)
    assert len(list(adapters(task.model))) == 2 * 7  # all of the decoder, which the adapter decides
    for name, adapter in adapters(task.model):
        assert torch.equal(adapter.B.weight, kept[f"{name}.lora.B.weight"])
        assert (adapter.rank, adapter.scale) == (2, kept[f"{name}.lora.alpha"].item() / 2)
        assert adapter.A.weight.requires_grad
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", **start))
    assert "starts from            earlier, epsilon" in capsys.readouterr().out
    before, after = (
        json.loads((tmp_path / name / "publish" / "privacy_report.json").read_text()) for name in ("earlier", "out")
    )
    (told,) = after["starts_from"]
    assert (told["name"], told["epsilon"], told["declared_public"]) == ("earlier", before["epsilon"], False)
    assert after["epsilon"] == before["epsilon"]  # the same plan: of this training alone
    assert "What it started from" in (tmp_path / "out" / "publish" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "run_config.json").read_text())["lora_r"] is None
    (earlier / "publish" / "lora_weights.bin").write_bytes(
        (tmp_path / "out" / "publish" / "lora_weights.bin").read_bytes()
    )
    (earlier / "publish" / "adapter_config.json").unlink()  # so that the other file is read
    with pytest.raises(InvalidArgument, match=r"initial_adapter\[0\].sha256 was .* in the checkpoint and is"):
        job(**start, resume_from_checkpoint="latest")
