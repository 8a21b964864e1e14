"""The measured clip norm is just above the gradients of what the model itself writes, whatever is trained and however
its weights are spread, and no row of anybody's data enters it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

import train_clm
from dptune import CausalLMLoss, InvalidArgument
from dptune.lora import adapters
from tests.processes import run_processes
from tests.scripts.test_train_clm import flags
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer
from tests.utils.training.test_in_step import How, model_of
from tests.utils.training.test_micro_batches import adapted
from utils.models.loading import checkpoint_activations
from utils.models.trainable import choose_trainable
from utils.training.measured_clip_norm import clip_norm_of_own_texts, gradient_norms, just_above, own_texts, typical

TOKENIZER = tiny_tokenizer()
TOKENIZER.pad_token = TOKENIZER.eos_token  # as `load_tokenizer` does
pytestmark = pytest.mark.usefixtures("no_plots")


def whole(what: str) -> Any:
    model = tiny_llama(vocab_size=len(TOKENIZER), tie=what == "tied")
    choose_trainable(model, ["norms" if what == "norms" else "all"])
    return model


def lora(**_: object) -> Any:
    torch.manual_seed(0)
    return adapted()


def norms_alone(model: Any, rows: list[list[int]]) -> list[float]:
    """The oracle's: each row alone through the model's own loss, by autograd."""
    trained, norms = [p for p in model.parameters() if p.requires_grad], []
    for row in rows:
        ids = torch.tensor([row])
        loss = model.eval()(input_ids=ids, labels=ids).loss
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        norms.append(float(torch.cat([one.flatten() for one in gradients if one is not None]).norm()))
    return norms


@pytest.mark.parametrize("what", ["lora", "all", "tied", "norms"])
@pytest.mark.parametrize("loss_scale", [1.0, 4096.0])
def test_it_is_just_above_the_median_gradient_of_the_models_own_texts(what: str, loss_scale: float) -> None:
    model = lora() if what == "lora" else whole(what)
    rows = own_texts(model, TOKENIZER, tokens=64)
    wanted = norms_alone(model, rows)
    assert gradient_norms(model, CausalLMLoss(model), rows, loss_scale=loss_scale) == pytest.approx(wanted, rel=1e-4)
    found = clip_norm_of_own_texts(model, CausalLMLoss(model), TOKENIZER, longest=64, loss_scale=loss_scale)
    assert median(wanted) * (1 - 1e-4) <= found <= 1.1 * median(wanted)


def test_its_texts_are_sampled_from_the_whole_vocabulary_and_end_with_an_end_token() -> None:
    model = whole("all")
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.1  # not used
    rows = own_texts(model, TOKENIZER, tokens=64)
    assert rows == own_texts(model, TOKENIZER, tokens=64)
    assert (len(rows), {row[0] for row in rows}) == (16, {TOKENIZER.bos_token_id})
    assert len({tuple(row) for row in rows}) == 16
    assert len({token for row in rows for token in row}) > 200, "a random model writes every token"
    ends = [row.index(2) for row in rows if 2 in row[1:]]
    assert ends, "none of the texts ended"
    assert all(len(row) == row.index(2) + 1 if 2 in row[1:] else len(row) == 64 for row in rows)
    assert {len(row) for row in own_texts(model, TOKENIZER, tokens=2)} == {2}


def test_a_model_writes_what_it_is_likely_to_write() -> None:
    """One that all but knows its next token writes just that."""
    model = whole("all")
    with torch.no_grad():
        model.model.norm.weight.zero_()  # logits of 0, before a bias
    model.lm_head = nn.Linear(model.config.hidden_size, len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.bias.zero_()[7] = 20.0
    assert own_texts(model, TOKENIZER, tokens=9) == [[1, *[7] * 8]] * 16


@pytest.mark.parametrize("what", ["lora", "all"])
def test_measuring_changes_nothing(what: str) -> None:
    model = lora() if what == "lora" else whole(what)
    checkpoint_activations(model)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    random, settings = torch.get_rng_state(), model.generation_config
    found = [clip_norm_of_own_texts(model, CausalLMLoss(model), TOKENIZER, longest=16) for _ in range(2)]
    assert found[0] == found[1]
    assert model.training
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), random)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapters_start_has_gradients_at_b_alone() -> None:
    model = lora()
    for _, adapter in adapters(model):
        adapter.B.weight.data.zero_()
    rows = own_texts(model, TOKENIZER, tokens=16)
    every = gradient_norms(model, CausalLMLoss(model), rows)
    for _, adapter in adapters(model):
        adapter.A.weight.requires_grad_(False)
    assert gradient_norms(model, CausalLMLoss(model), rows) == pytest.approx(every)


@pytest.mark.parametrize(
    ("norm", "rounded"), [(0.0123, 0.013), (0.2, 0.2), (0.994, 1.0), (1.17, 1.2), (31.2, 32.0), (123.0, 130.0)]
)
def test_it_has_two_digits_and_is_rounded_up(norm: float, rounded: float) -> None:
    assert just_above(norm, given="auto") == rounded


def test_a_typical_norm_is_the_median_of_finite_ones() -> None:
    assert typical([3.0, 1.0, 1e9]) == 3.0
    assert math.isnan(typical([3.0, math.inf, 1.0]))


@pytest.mark.parametrize("weight", [0.0, math.nan])
def test_gradients_without_a_length_need_a_clip_norm(weight: float) -> None:
    model = whole("norms")
    choose_trainable(model, ["model.layers.*norm*"])
    losses = CausalLMLoss(model)
    rows = own_texts(model, TOKENIZER, tokens=8)
    model.model.norm.weight.data.fill_(weight)
    told = "0.0" if weight == 0 else "nan"
    with pytest.raises(InvalidArgument, match=rf"^--clip_norm='auto': cannot be measured: .* norm {told}; give a"):
        just_above(typical(gradient_norms(model, losses, rows)), given="auto")


# --- sharded weights


def _measured(rank: int, gather: Any, folder: Path) -> dict[str, float]:
    del rank, gather
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # of the group that is there already
    found = {}
    for name, how in {"lora": How(), "whole": How(whole=True), "recomputing": How(whole=True, recompute=True)}.items():
        model = model_of(folder, how)
        found[name] = clip_norm_of_own_texts(model, CausalLMLoss(model), TOKENIZER, longest=24)
    return found


def test_ranks_with_sharded_weights_measure_what_one_process_does(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    wanted = {}
    for name, how in {"lora": How(sharded=False), "whole": How(whole=True, sharded=False)}.items():
        model = model_of(tmp_path, how)
        wanted[name] = clip_norm_of_own_texts(model, CausalLMLoss(model), TOKENIZER, longest=24)
    wanted["recomputing"] = wanted["whole"]
    assert run_processes(2, _measured, tmp_path) == [wanted, wanted]


# --- a run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "one.jsonl").write_text('{"instruction": "Say a word.", "answer": "word end"}\n' * 40)
    (tmp_path / "other.jsonl").write_text('{"instruction": "zzz 9", "answer": "9 q9 q9 q9"}\n' * 50)
    return tmp_path


def run(model: Path, data: Path, out: Path, **changes: object) -> dict[str, Any]:
    settings = {"clip_norm": "auto", "num_train_epochs": None, "max_train_steps": 2, "checkpointing_steps": 1}
    train_clm.main(flags(model, data, out, **settings | changes))
    return json.loads((out / "publish" / "privacy_report.json").read_text())


@pytest.mark.parametrize("changes", [{}, {"lora_r": None, "trainable": "all"}])
def test_it_is_the_same_for_other_data_and_stated_everywhere(
    changes: dict[str, object], tiny_model_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (run(tiny_model_dir, data / f"{name}.jsonl", data / name, **changes) for name in ("one", "other"))
    clip_norm = one["clip_norm"]
    assert clip_norm == other["clip_norm"] != 1.0
    assert one["guarantee"] == "dp"
    printed = capsys.readouterr().out
    assert "clip norm              measured before training, on texts that the model writes\n" in printed
    assert f"clip norm              {clip_norm:g}, measured on texts that the model writes\n" in printed
    card = (data / "one" / "publish" / "README.md").read_text()
    assert f"--clip_norm {clip_norm}" in card
    assert "auto" not in card
    assert json.loads((data / "one" / "run_config.json").read_text())["clip_norm"] == clip_norm
    steps = [json.loads(row) for row in (data / "one" / "ledger.jsonl").read_text().splitlines()]
    assert {row["clip_norm"] for row in steps if "clip_norm" in row} == {clip_norm}


def test_a_resumed_run_keeps_the_number_that_it_began_with(
    tiny_model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = run(tiny_model_dir, data / "one.jsonl", data / "out")["clip_norm"]

    def measured_again(*_: object, **__: object) -> float:
        raise AssertionError("a resumed run does not measure")

    monkeypatch.setattr("utils.training.causal_lm.load.clip_norm_of_own_texts", measured_again)
    for steps, given in ((3, "auto"), (4, began)):
        more = {"max_train_steps": steps, "resume_from_checkpoint": "latest", "clip_norm": given}
        assert run(tiny_model_dir, data / "one.jsonl", data / "out", **more)["clip_norm"] == began
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(tiny_model_dir, data / "one.jsonl", data / "out", **more | {"clip_norm": 7})
    assert f"clip_norm was {began} in the checkpoint and is 7.0 now" in capsys.readouterr().err


@pytest.mark.parametrize("clipping", ["per-layer", "automatic", "adaptive"])
def test_every_style_of_clipping_starts_from_it(clipping: str, tiny_model_dir: Path, data: Path) -> None:
    flat, other = (
        run(tiny_model_dir, data / "one.jsonl", data / name, clipping=name, max_train_steps=1)
        for name in ("flat", clipping)
    )
    assert other["clip_norm"] == flat["clip_norm"] != 1.0


def test_a_dry_run_says_that_it_is_measured(
    tiny_model_dir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ({}, {"train_file": None, "num_examples": 40}):
        settings = {"clip_norm": "auto", "dry_run": True, **more}
        train_clm.main(flags(tiny_model_dir, data / "one.jsonl", data / "out", **settings))
        printed = capsys.readouterr().out
        assert "clip norm              measured before training, on texts that the model writes\n" in printed
    assert not (data / "out").exists()
