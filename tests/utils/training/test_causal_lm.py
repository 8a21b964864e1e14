"""A language model's job: planned before its model is loaded, its neighbours checked before a private step."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaModel

import train_clm
from dptune import InvalidArgument
from dptune.lora import adapters
from dptune.report.card import LORA_ADAPTER, WHOLE_MODEL
from dptune.run.checkpoint import load_checkpoint
from tests.coupled_rows import couple_rows
from tests.scripts.test_train_clm import flags
from tests.tasks import rows
from tests.utils.data.test_template_date import TELLING, set_clock
from utils.cli.flags import parse
from utils.cli.launch import make_accelerator
from utils.models.loading import load_tokenizer
from utils.training import causal_lm, target
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups
from utils.training.causal_lm import CausalLMJob, CausalLMTask, plan_job, recomputes, require_answers
from utils.training.data_arguments import DataArguments
from utils.training.micro_batches import remember_budget
from utils.training.run import open_folder

WITHOUT_PRIVACY = {"clip_norm": -1, "noise_multiplier": -1}


@pytest.fixture
def job(tiny_model_dir: Path, tmp_path: Path) -> Any:
    """Plans a job in `tmp_path/out`, with flags changed."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "Say a word.", "answer": "word end"}\n' * 40)

    def make(**changes: object) -> CausalLMJob:
        groups = Groups(*parse(*CAUSAL_LM_GROUPS, args=flags(tiny_model_dir, data, tmp_path / "out", **changes)))
        with open_folder(groups.output, make_accelerator()) as folder:
            return plan_job(groups, folder)

    return make


def test_a_job_is_planned_from_its_flags_and_writes_nothing(job: Any, tmp_path: Path) -> None:
    planned = job(num_train_epochs=2)
    assert (planned.plan.num_examples, planned.plan.expected_batch_size, planned.plan.steps) == (40, 16, 5)
    assert (planned.asked, planned.token_budget, planned.config["num_processes"]) == (4 * 48, 4 * 48, 1)
    assert planned.identity == {"training_data": planned.train.fingerprint(), "optimizer": "lowpass-adam"}
    assert not (tmp_path / "out").exists()


def test_a_resumed_job_has_the_date_and_so_the_data_that_it_began_with(
    job: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "telling")
    (model / "chat_template.jinja").write_text(TELLING)
    given = {"model_name_or_path": model, "prompt_style": "chat", "max_train_steps": 2, "checkpointing_steps": 1}
    set_clock(monkeypatch, "2026-01-31T23:00:00")
    began = job(**given)
    assert began.identity["template_date"] == "2026-01-31"
    assert "31 Jan" in began.tokenizer.decode(began.train.ids)
    train_clm.main(flags(model, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    set_clock(monkeypatch, "2026-02-01T01:00:00")
    resumed = job(**given, resume_from_checkpoint="latest")
    assert resumed.identity == began.identity
    assert json.loads((tmp_path / "out" / "run_config.json").read_text())["template_date"] == "2026-01-31"


def test_a_data_cache_is_made_by_a_run_and_read_by_dry_runs_too(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, reused = tmp_path / "cache", "made by an earlier run"
    job(data_cache=cache, dry_run=True)
    assert not cache.exists()
    first = job(data_cache=cache)
    assert reused not in capsys.readouterr().out
    for dry_run in (None, True):
        again = job(data_cache=cache, dry_run=dry_run)
        assert reused in capsys.readouterr().out
        assert again.identity == first.identity
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidArgument, match=r"--data_cache=.*made with another --block_size"):
        job(data_cache=cache, block_size=32)


def test_files_are_recorded_as_in_the_command_line(job: Any, tmp_path: Path) -> None:
    """One file as text, as older runs recorded it, which are compared when they resume."""
    assert job().config["train_file"] == str(tmp_path / "rows.jsonl")
    (tmp_path / "shards").mkdir()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "shards" / "1.jsonl")
    planned = job(train_file=tmp_path / "shards", validation_file=tmp_path / "*.jsonl")
    assert planned.config["train_file"] == str(tmp_path / "shards")
    assert planned.config["validation_file"] == str(tmp_path / "*.jsonl")
    assert len(planned.train) == len(planned.held_out) == 40


@pytest.mark.parametrize("rows", ["train", "held out"])
def test_a_token_without_an_embedding_is_named_before_the_model_is_loaded(
    rows: str, job: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A chat template writes a token that was added to the tokenizer alone."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "added")
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(model)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "many.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    given = {"train_file": tmp_path / "many.jsonl"} if rows == "train" else {"validation_file": tmp_path / "chat.jsonl"}
    what = "training" if rows == "train" else "held-out"
    with pytest.raises(InvalidArgument, match=rf"{what} example 1 .* has token \d+ \(<\|im_end\|>\), but the model"):
        job(model_name_or_path=model, **given)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "word " * 60, "answer": "one"}, "within --block_size 48; raise"),
        (
            {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt (secret)", "content": "Hello."}]},
            r"48 \(answers have the role assistant; the file has \(name not shown\), human\); raise",
        ),
    ],
)
def test_training_data_without_an_answer_are_refused_before_the_model_is_loaded(
    row: dict[str, Any], told: str, job: Any, tmp_path: Path
) -> None:
    (tmp_path / "nothing.jsonl").write_text((json.dumps(row) + "\n") * 40)
    with pytest.raises(
        InvalidArgument, match=f"--train_file=.*no training example has an answer token .*{told}"
    ) as caught:
        job(train_file=tmp_path / "nothing.jsonl")
    assert "secret" not in str(caught.value)


def test_a_budget_that_did_not_fit_is_remembered(job: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    remember_budget(tmp_path / "out", asked=192, fits=64)
    assert (job().asked, job().token_budget) == (192, 64)
    assert job(max_tokens_per_device=100).token_budget == 100


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
        assert planned.load().model is not None
        return
    with pytest.raises(InvalidArgument, match="per-example gradients differ from autograd's"):
        planned.load()


def test_a_check_that_does_not_fit_in_memory_is_told_in_one_line(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(causal_lm, "check_rules", full)
    with pytest.raises(InvalidArgument, match=r"^block_size=48: out of memory on two random rows .*; lower it"):
        job().load()


def test_an_adapter_starts_as_the_seed_says_and_a_whole_model_is_float32(job: Any) -> None:
    one, same, other = (job(lora_target_modules="q_proj", seed=seed).load() for seed in (5, 5, 6))
    starts = [next(adapters(task.model))[1].A.weight for task in (one, same, other)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert (one.trained, one.artifact) == (None, LORA_ADAPTER)
    whole = job(trainable="norms", lora_r=None).load()
    assert whole.artifact == WHOLE_MODEL
    assert whole.trained == [name for name, p in whole.model.named_parameters() if p.requires_grad]
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}


def in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as a launch with fp16 does on a GPU."""
    monkeypatch.setattr(target, "compute_dtype", lambda *_: torch.float16)


def test_a_whole_model_trains_in_float16_as_in_float32(
    job: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws and noise: without its gradients a model would be off by more than 0.03 of the change."""
    how = {"trainable": "all", "lora_r": None, "insecure_test_seed": 1, "max_train_steps": 3, "num_train_epochs": None}
    found = []
    for name in ("float32", "float16"):
        if name == "float16":
            in_float16(monkeypatch)
        job(**how, optimizer="sgd", learning_rate=1.0).run()
        (tmp_path / "out").rename(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "publish")
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    change = found[0] - torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    assert 0 < (found[1] - found[0]).norm() < 5e-3 * change.norm()


def test_a_whole_model_that_overflows_in_float16_is_refused_before_its_first_step(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float16(monkeypatch)
    planned = job(trainable="all", lora_r=None)
    monkeypatch.setattr(causal_lm, "loss_scale", lambda *_, **__: 2.0**24)
    with pytest.raises(InvalidArgument, match="its gradients overflow or vanish in lower precision"):
        planned.load()
    assert not (tmp_path / "out" / "ledger.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused(job: Any) -> None:
    planned = job()
    identity = planned.load().identity
    saved = type("Saved", (), {"identity": identity | {"base_model": "another"}})
    folder = dataclasses.replace(planned.folder, saved=saved)
    with pytest.raises(InvalidArgument, match="base_model was 'another' in the checkpoint"):
        dataclasses.replace(planned, folder=folder).load()


def test_held_out_data_without_an_answer_are_refused() -> None:
    data = DataArguments(train_file="rows.jsonl", block_size=48)
    require_answers(None, data)
    require_answers(rows(), data)
    silent = dataclasses.replace(rows(), is_answer=rows().is_answer & False)
    with pytest.raises(InvalidArgument, match=r"^--validation_file='rows.jsonl': .*within --block_size 48"):
        require_answers(silent, data)


def test_the_held_out_loss_is_measured_where_there_are_data(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "held_out_loss", lambda _, data, __: float(len(data)))
    task = job().load()
    assert isinstance(task, CausalLMTask)
    nothing: Any = None
    assert task.evaluate(nothing) == {}
    task.job = dataclasses.replace(task.job, held_out=rows())
    assert task.evaluate(nothing) == {"eval_loss": 10.0}


def test_activations_are_recomputed_where_flag_or_launch_asks(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recomputes(job(gradient_ckpt=True).groups)
    plain = job().groups
    assert not recomputes(plain)
    monkeypatch.setattr(causal_lm, "sharding_of_launch", lambda: type("Sharding", (), {"checkpoint_activations": True}))
    assert recomputes(plain)


# --- going on from an adapter ---

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
    task = job(**start).load()
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


def test_what_the_adapter_decides_is_not_given_too(tmp_path: Path, tiny_model_dir: Path) -> None:
    given = flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", initial_adapter="somewhere")
    groups = Groups(*parse(*CAUSAL_LM_GROUPS, args=given))
    with pytest.raises(InvalidArgument, match=r"^--lora_r=4: comes from --initial_adapter; leave it out"):
        groups.refuse_unread({"lora_r", "initial_adapter"})


# --- held-out rows that decide ---


def test_held_out_rows_decide_only_if_they_are_declared_public(job: Any, tmp_path: Path) -> None:
    held_out = {"validation_file": tmp_path / "rows.jsonl", "early_stopping_patience": 1}
    with pytest.raises(InvalidArgument, match=r"^--early_stopping_patience=1: the result would depend on the held-out"):
        job(**held_out)
    with pytest.raises(InvalidArgument, match="there are no held-out rows"):
        job(early_stopping_patience=1, validation_is_public=True)
    assert job(**held_out, validation_is_public=True).groups.output.selection.patience == 1
    assert job(**held_out, **WITHOUT_PRIVACY).groups.output.selection.patience == 1


def test_an_early_end_releases_the_best_weights_and_states_the_plans_epsilon(
    job: Any,  # noqa: ARG001  # makes the rows
    tiny_model_dir: Path,
    tmp_path: Path,
    no_plots: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([5.0, 3.0, 4.0])  # at the start and after two steps
    monkeypatch.setattr(causal_lm, "held_out_loss", lambda *_: next(losses))
    given = {"max_train_steps": 9, "num_train_epochs": None, "eval_freq": 1, "early_stopping_patience": 1}
    given |= {"validation_file": tmp_path / "rows.jsonl", "validation_is_public": True, "load_best_model_at_end": True}
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    report = json.loads((tmp_path / "out" / "publish" / "privacy_report.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (report["steps"], report["unused_steps"]) == (2, 7)
    assert (results["eval_loss"], results["released_step"]) == (3.0, 1)


def test_an_average_is_planned_stated_and_released(
    job: Any,
    tiny_model_dir: Path,
    tmp_path: Path,
    no_plots: None,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"max_train_steps": 4, "num_train_epochs": None, "average_last": 0.5}
    planned = job(**given)
    assert (planned.identity["average_last"], planned.config["average_last"]) == (0.5, 0.5)
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    told = "mean of the weights after steps 3 to 4"
    assert capsys.readouterr().out.count(f"released weights       {told}\n") == 3, "twice in plans, once at the end"
    published = tmp_path / "out" / "publish"
    assert json.loads((published / "privacy_report.json").read_text())["average"] == told
    card = (published / "README.md").read_text()
    assert f"| Released weights | {told} |" in card
    assert "--average_last 0.5" in card
    last = load_checkpoint(tmp_path / "out" / "checkpoint-4")
    released = torch.load(published / "lora_weights.bin", weights_only=True)
    for name, tensor in last.average.items():
        assert torch.equal(released[name], tensor)
        assert not torch.equal(released[name], last.weights[name])


def test_another_average_is_not_resumed(job: Any, tiny_model_dir: Path, tmp_path: Path, no_plots: None) -> None:  # noqa: ARG001
    given = {"max_train_steps": 1, "num_train_epochs": None, "ema": 0.9}
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", tmp_path / "out", **given))
    with pytest.raises(InvalidArgument, match=r"ema was 0\.9 in the checkpoint and is 0\.8 now"):
        job(**given | {"ema": 0.8, "resume_from_checkpoint": "latest"})
    with pytest.raises(InvalidArgument, match=r"ema was 0\.9 in the checkpoint and is None now"):
        job(**given | {"ema": None, "resume_from_checkpoint": "latest"})


# --- gradients without privacy ---


@pytest.mark.parametrize(
    ("how", "expected"),
    [({}, None), (WITHOUT_PRIVACY, 1.0), (WITHOUT_PRIVACY | {"max_grad_norm": 0}, None)],
)
def test_a_run_without_privacy_clips_as_the_trainer_does(
    how: dict[str, Any], expected: float | None, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[Any] = []
    monkeypatch.setattr(causal_lm, "train", lambda *given: paces.append(given[4]))
    job(**how).run()
    assert paces[0].plain_max_grad_norm == expected


# --- optimizers and attention ---


def test_an_optimizer_that_cannot_work_here_is_refused_before_the_data_are_read(job: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^--optimizer='paged-adamw-8bit': its pages are for a GPU"):
        job(optimizer="paged-adamw-8bit")


def test_attention_is_that_of_the_flag(job: Any) -> None:
    assert job(attn_implementation="eager").load().model.config._attn_implementation == "eager"
