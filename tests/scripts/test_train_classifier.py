"""train_classifier.py as a user runs it, on tiny models, in this process and in two."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from dptune.adapter_files import PEFT_CONFIG_NAME as ADAPTER
from dptune.ledger import Ledger
from dptune.report.check import check_publishable
from dptune.run import session
from dptune.run.checkpoint import load_checkpoint
from tests.classifier_folders import NO_DROPOUT, save_bert, save_llama, write_qnli, write_sst2
from tests.classifier_settings import flags
from tests.processes import run_processes
from train_classifier import main
from utils.classification import run
from utils.classification.files import load_classifier, load_classifier_tokenizer
from utils.classification.head_arguments import WORDS_OF_TASK, TaskWords
from utils.classification.losses import ClassificationLoss
from utils.classification.measured_defaults import measure_clip_norm
from utils.classification.mode_defaults import MODES
from utils.classification.modes import prepare_mode
from utils.classification.tasks import load_task
from utils.cli.flags import public_config

KEYS = {
    *("notice", "task", "mode", "private", "epsilon", "delta", "noise_multiplier", "clip_norm"),
    *("learning_rate", "head_learning_rate"),
    *("trained_parameters", "steps", "expected_batch_size", "train_examples", "scores", "majority", "seed", "seconds"),
    "settings",
}
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qnli(write_sst2(tmp_path_factory.mktemp("glue")))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One without dropout."""
    return save_bert(tmp_path_factory.mktemp("still_bert"), **NO_DROPOUT)


@pytest.fixture(scope="module")
def lively_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose hidden states tell words apart from the start, so that it learns in a few steps."""
    return save_bert(tmp_path_factory.mktemp("lively_bert"), initializer_range=0.4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def results_of(out: Path, task: str = "sst2") -> dict[str, Any]:
    return json.loads((out / task / "results.json").read_text())


def report_of(out: Path, task: str = "sst2") -> dict[str, Any]:
    return json.loads((out / task / "publish" / "privacy_report.json").read_text())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "sst2" / "publish" / "model.safetensors")


# --- every mode ---


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains_privately(
    mode: str, name: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = request.getfixturevalue(name)
    given = flags(checkpoint, data, tmp_path, finetune_mode=mode, enable_dp=True, noise_multiplier=1, clip_norm=0.1)
    given += ["--base_model_name", "ann/base"]
    if (mode, name) == ("bias-only", "llama"):
        with pytest.raises(SystemExit) as ended:
            main(given)
        assert ended.value.code == 2
        assert "LlamaForSequenceClassification has no biases" in capsys.readouterr().err
        return
    main(given)
    found, report = results_of(tmp_path), report_of(tmp_path)
    assert set(found) == KEYS
    assert (found["task"], found["mode"], found["private"], found["steps"]) == ("sst2", mode, True, 2)
    assert found["epsilon"] == report["epsilon"] == Ledger(tmp_path / "sst2" / "ledger.jsonl").epsilon(1e-3)
    assert (report["guarantee"], report["steps"], report["clip_norm"]) == ("dp", 2, 0.1)
    assert (report["num_examples"], report["expected_batch_size"]) == (120, 24)
    assert set(found["scores"]) == set(found["majority"]) == {"validation"}
    assert found["majority"]["validation"] == pytest.approx(17 / 33)
    check_publishable(tmp_path / "sst2" / "publish")
    saved = {path.name for path in (tmp_path / "sst2" / "publish").iterdir()} & {"config.json", "adapter", ADAPTER}
    wholes = {"full", "last-layer", "lora", "bias-only"}
    assert saved == ({"config.json", "adapter"} if "+" in mode else {"config.json"} if mode in wholes else {ADAPTER})
    printed = capsys.readouterr().out
    assert f"fine-tuning mode       {mode}" in printed
    assert "(default of this mode)" in printed
    assert f"trainable parameters   {found['trained_parameters']:,} of" in printed


# --- label words ---


def test_a_head_that_starts_from_label_words_is_recorded_and_costs_nothing(
    llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"finetune_mode": "lora", "enable_dp": True, "noise_multiplier": 1}
    words = {"label_words": "bad good", "checkpointing_steps": 1}
    suffix = ["--prompt_suffix", " this film was"]
    main(flags(llama, data, tmp_path / "plain", **given))
    main([*flags(llama, data, tmp_path / "words", **given | words), *suffix])
    assert "head starts from       output embeddings (negative: bad; positive: good)" in capsys.readouterr().out
    plain, worded = report_of(tmp_path / "plain"), report_of(tmp_path / "words")
    assert worded["epsilon"] == plain["epsilon"]
    recorded = json.loads((tmp_path / "words" / "sst2" / "publish" / "dptune_settings.json").read_text())
    assert (recorded["label_words"], recorded["prompt_suffix"]) == (["bad", "good"], " this film was")
    card = (tmp_path / "words" / "sst2" / "publish" / "README.md").read_text()
    assert "Every text must end with `' this film was'`" in card
    assert "--label_words bad good" in card
    check_publishable(tmp_path / "words" / "sst2" / "publish")

    resumed = {"resume_from_checkpoint": "latest"}
    changes = {
        "label_words[0]": ({"label_words": "awful good"}, suffix),
        "prompt_suffix": ({}, ["--prompt_suffix", " was"]),
    }
    shutil.rmtree(tmp_path / "words" / "sst2" / "publish")
    (tmp_path / "words" / "sst2" / "results.json").unlink()
    for name, (other, own_suffix) in changes.items():
        with pytest.raises(SystemExit):
            main([*flags(llama, data, tmp_path / "words", **given | words | resumed | other), *own_suffix])
        assert f"{name} was" in capsys.readouterr().err
    main([*flags(llama, data, tmp_path / "words", **given | words | resumed), *suffix])
    assert report_of(tmp_path / "words") == worded


def test_words_of_the_task_are_taken_and_mistakes_are_found_in_a_dry_run(
    lively_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(WORDS_OF_TASK, "sst2", TaskWords(("bad", "good"), " was", ("a bad film", "a good film")))
    main(flags(lively_bert, data, tmp_path, label_words="auto", dry_run=True))
    told = "head starts from       encoded descriptions (negative: a bad film; positive: a good film)"
    assert told in capsys.readouterr().out
    for more, said in (
        (["x", "y", "z"], "there are 3 words, but sst2 has 2 classes"),
        (["auto"], "works only with decoders"),
    ):
        line = [*flags(lively_bert, data, tmp_path, dry_run=True), "--label_words", *more]
        with pytest.raises(SystemExit):
            main(line if len(more) > 1 else [*line, "--prompt_suffix", " It was"])
        assert said in capsys.readouterr().err


# --- learning ---


def test_without_privacy_an_easy_task_is_learned_and_the_saved_model_scores_the_same(
    lively_bert: Path, data: Path, tmp_path: Path
) -> None:
    main(flags(lively_bert, data, tmp_path, num_train_epochs=12, learning_rate=1e-2, insecure_test_seed=1))
    found = results_of(tmp_path)
    assert found["scores"]["validation"]["accuracy"] > 0.9 > found["majority"]["validation"] + 0.3
    assert (found["private"], found["epsilon"], found["noise_multiplier"]) == (False, None, None)
    folder = tmp_path / "sst2" / "publish"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    held_out = load_task("sst2", tokenizer=tokenizer, max_length=16, data_dir=str(data)).validation["validation"]
    batch = held_out.batch(range(len(held_out)), tokenizer.pad_token_id)
    labels = batch.pop("labels")
    with torch.no_grad():
        rows = [json.loads(line) for line in (tmp_path / "sst2" / "diagnostics.jsonl").read_text().splitlines()[1:]]
    assert [row["step"] for row in rows if "scores" in row] == list(range(0, 61, 5)), "an epoch is 5 steps"
    right = model(**batch).logits.argmax(1).eq(labels).double().mean().item()
    assert right == pytest.approx(found["scores"]["validation"]["accuracy"])


@pytest.mark.parametrize("mode", ["full", "prefix+lora"])
def test_with_privacy_too(mode: str, lively_bert: Path, data: Path, tmp_path: Path) -> None:
    given = {
        "enable_dp": True,
        "noise_multiplier": 0.4,
        "batch_size": 100,
        "num_train_epochs": 20,
        "micro_batch_size": 64,
    }
    given |= {"finetune_mode": mode, "learning_rate": 1e-2, "eval_freq": 6, "insecure_test_seed": 2, "clip_norm": 1}
    main(flags(lively_bert, data, tmp_path, **given))
    found = results_of(tmp_path)
    assert found["scores"]["validation"]["accuracy"] > found["majority"]["validation"] + 0.2
    rows = [json.loads(line) for line in (tmp_path / "sst2" / "diagnostics.jsonl").read_text().splitlines()[1:]]
    assert [row["step"] for row in rows if "scores" in row] == [0, 6, 12, 18, 24]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_a_users_own_rows(bert: Path, tmp_path: Path) -> None:
    for name in ("train", "held_out"):
        with (tmp_path / f"{name}.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerow(["opinion", "mood"])
            writer.writerows([f"the film was {word}", "sunny" if word == "good" else "grim"] for word in WORDS_OF_ROWS)
    own = {"train_file": tmp_path / "train.csv", "text_columns": "opinion", "label_column": "mood"}
    given = flags(bert, tmp_path, tmp_path / "out", datasets=None, data_dir=None, batch_size=10, **own)
    main(given)
    found = results_of(tmp_path / "out", "train")
    assert (found["train_examples"], found["scores"]) == (40, {})
    other = ["--output_dir", str(tmp_path / "other"), "--validation_file", str(tmp_path / "held_out.csv")]
    main([*given, *other, "--class_names", "sunny", "mild", "grim"])
    assert set(results_of(tmp_path / "other", "train")["scores"]) == {"validation"}
    config = json.loads((tmp_path / "other" / "train" / "publish" / "config.json").read_text())
    assert config["label2id"] == {"sunny": 0, "mild": 1, "grim": 2}


WORDS_OF_ROWS = ["good", "bad"] * 20


def test_a_private_run_on_a_file_that_names_users_is_refused_unless_told(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"the film was {word}", "label": word, "speaker": "Jane Roe"} for word in WORDS_OF_ROWS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"train_file": tmp_path / "train.jsonl", "text_columns": "text", "datasets": None, "data_dir": None}
    private = {"enable_dp": True, "noise_multiplier": 1, "clip_norm": 1, "delta": 1e-3, "batch_size": 10}
    line = flags(bert, tmp_path, tmp_path / "out", dry_run=True, **own, **private)
    with pytest.raises(SystemExit):
        main(line)
    shown = capsys.readouterr().err
    assert "names users in speaker, but this program protects rows" in shown
    assert "Jane" not in shown
    main([*line, "--ignore_users"])
    public = {"clip_norm": 1, "batch_size": 10}
    main(flags(bert, tmp_path, tmp_path / "out", dry_run=True, **own, **public))


# --- privacy is what was asked for, and said ---


@pytest.mark.parametrize(("flag", "value"), [("target_epsilon", 8), ("noise_multiplier", 0.7), ("delta", 1e-6)])
def test_a_setting_of_privacy_without_enable_dp_is_refused_before_anything_is_read(
    flag: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(SystemExit) as stopped:
        main(flags(nowhere, nowhere, tmp_path, **{flag: value}))
    assert stopped.value.code == 2
    refusal = f"error: --{flag}={float(value)!r}: is not read without --enable_dp: give that too, or leave it out"
    assert capsys.readouterr().err.strip() == refusal


def test_a_run_without_enable_dp_is_no_privacy(bert: Path, data: Path, tmp_path: Path) -> None:
    main(flags(bert, data, tmp_path))
    assert report_of(tmp_path)["guarantee"] == "none"
    assert results_of(tmp_path)["private"] is False
    assert not (tmp_path / "sst2" / "ledger.jsonl").exists()
    assert "There is no privacy guarantee" in (tmp_path / "sst2" / "publish" / "README.md").read_text()


def test_each_task_has_a_folder_and_a_budget_of_its_own(bert: Path, data: Path, tmp_path: Path) -> None:
    given = {"datasets": "sst2 qnli", "enable_dp": True, "target_epsilon": 2}
    main(flags(bert, data, tmp_path, **given))
    for task, examples in (("sst2", 120), ("qnli", 60)):
        report = report_of(tmp_path, task)
        assert report["num_examples"] == examples
        assert 1.5 < report["epsilon"] <= 2
        assert Ledger(tmp_path / task / "ledger.jsonl").steps == report["steps"] == results_of(tmp_path, task)["steps"]
        names = {path.name for path in (tmp_path / task).iterdir()}
        assert {"publish", "diagnostics.png", "all_results.json", "run_config.json"} <= names
        assert "classifier trained from" in (tmp_path / task / "publish" / "README.md").read_text()


def test_masks_are_drawn_afresh_in_every_step(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(session, "new_randomness", lambda *step, test_seed: drawn.append((*step, test_seed)))
    modes: list[bool] = []
    loss = ClassificationLoss.__call__
    monkeypatch.setattr(
        ClassificationLoss,
        "__call__",
        lambda self, **batch: modes.append(self.model.training) or loss(self, **batch),
    )
    main(flags(bert, data, tmp_path, num_train_epochs=0.6))
    assert drawn == [(0, 1, None), (0, 2, None), (0, 3, None)]
    assert modes, "dropout is on while training"
    assert all(modes), "dropout is on while training"


@pytest.mark.parametrize("mode", ["full", "soft-prompt"])
def test_what_fits_in_memory_changes_nothing(mode: str, still_bert: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 64):
        out = tmp_path / str(size)
        given = {"finetune_mode": mode, "micro_batch_size": size, "enable_dp": True, "noise_multiplier": 1}
        given |= {"insecure_test_seed": 3}
        main(flags(still_bert, data, out, **given))
        found.append(load_file(next((out / "sst2").rglob("*model.safetensors"))))
        assert report_of(out)["guarantee"] == "none", "a test seed protects nobody"
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def test_without_privacy_the_whole_gradient_is_clipped_if_asked(lively_bert: Path, data: Path, tmp_path: Path) -> None:
    """A model whose gradient is long whatever is drawn: a draw of as many rows of each class hardly moves another."""
    given = {"optimizer": "sgd", "learning_rate": 1, "lr_scheduler_type": "constant", "num_train_epochs": 0.2}
    main(flags(lively_bert, data, tmp_path, clip_norm=0.02, checkpointing_steps=1, **given))
    before, after = (load_checkpoint(tmp_path / "sst2" / f"checkpoint-{step}").weights for step in (0, 1))
    moved = torch.stack([(after[name] - before[name]).double().norm() for name in before]).norm()
    assert moved.item() == pytest.approx(0.02, rel=1e-3)


# --- stopping and going on ---


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, head, optimizer and dropout masks, to the bit."""
    given = {
        "finetune_mode": "lora",
        "lora_dropout": 0.2,
        "enable_dp": True,
        "noise_multiplier": 1,
        "num_train_epochs": 1,
    }
    given |= {"insecure_test_seed": 5}
    main(flags(bert, data, tmp_path / "whole", **given))

    own: Callable[..., None] = session.new_randomness

    def interrupted(rank: int, number: int, *, test_seed: int | None) -> None:
        own(rank, number, test_seed=test_seed)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    lines = flags(bert, data, tmp_path / "two", resume_from_checkpoint="latest", datasets="sst2 qnli", **given)
    monkeypatch.setattr(session, "new_randomness", interrupted)
    main(lines)
    assert "SIGTERM: stopped after step 3 of 5" in capsys.readouterr().out
    assert not (tmp_path / "two" / "sst2" / "results.json").exists()
    assert not (tmp_path / "two" / "qnli").exists()
    monkeypatch.undo()
    main(lines)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "two")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    ledgers = [(tmp_path / name / "sst2" / "ledger.jsonl").read_text() for name in ("whole", "two")]
    assert ledgers[0] == ledgers[1]
    assert results_of(tmp_path / "two", "qnli")["steps"] == 3
    capsys.readouterr()
    main(lines)
    assert capsys.readouterr().out.count("already finished") == 2


@pytest.mark.parametrize(("name", "mode"), [("bert", "full"), ("llama", "lora")])
def test_the_clip_norm_is_measured_where_none_is_given(
    name: str, mode: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start, on the model that is trained; the run can go on."""
    checkpoint = request.getfixturevalue(name)
    given = flags(checkpoint, data, tmp_path, finetune_mode=mode, enable_dp=True, noise_multiplier=1)
    main(given)
    assert "measured, just above a typical gradient at the start" in capsys.readouterr().out
    set_seed(0)
    pad_token_id = load_classifier_tokenizer(checkpoint).pad_token_id
    model, _ = load_classifier(checkpoint, ("negative", "positive"), pad_token_id=pad_token_id)
    model, _ = prepare_mode(model, mode, lora_r=2)
    measured = measure_clip_norm(model)
    assert results_of(tmp_path)["clip_norm"] == report_of(tmp_path)["clip_norm"] == measured
    (tmp_path / "sst2" / "results.json").unlink()
    main([*given, "--resume_from_checkpoint", "latest"])
    assert results_of(tmp_path)["clip_norm"] == measured
    assert results_of(tmp_path)["steps"] == 2


@pytest.mark.parametrize(("times", "warned"), [(0.2, True), (0.6, False), (5, False)])
def test_a_clip_norm_far_below_the_gradients_is_said(
    times: float, warned: bool, bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"finetune_mode": "ia3", "enable_dp": True, "noise_multiplier": 1, "dry_run": True}
    main(flags(bert, data, tmp_path, **given))
    printed = capsys.readouterr().out
    assert "far below" not in printed
    (measured,) = re.findall(r"^clip norm +(\S+)$", printed, re.MULTILINE)
    clip_norm = times * float(measured)
    main(flags(bert, data, tmp_path, **given, clip_norm=clip_norm))
    said = f"warning: clip norm {clip_norm:g} is far below the typical gradient norm at the start"
    assert (said in capsys.readouterr().out) == warned


def test_a_resumed_run_must_train_the_same(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"enable_dp": True, "noise_multiplier": 1.0, "finetune_mode": "prefix"}
    main(flags(bert, data, tmp_path, **given))
    (tmp_path / "sst2" / "results.json").unlink()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"finetune_mode": "soft-prompt"}, "finetune_mode was 'prefix' in the checkpoint and is 'soft-prompt' now"),
        ({"num_prepend_tokens": 4}, "num_prepend_tokens was 3 in the checkpoint and is 4 now"),
        ({"noise_multiplier": 0.9}, "noise_multiplier"),
        ({"clip_norm": 17}, "clip_norm"),
    ]
    for changed, named in changes:
        with pytest.raises(SystemExit) as ended:
            main(flags(bert, data, tmp_path, resume_from_checkpoint="latest", **(given | changed)))
        assert ended.value.code == 2
        assert named in capsys.readouterr().err


def test_a_run_of_a_version_with_the_older_names_resumes(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older = {"block_size": "max_length", "clip_norm": "max_grad_norm", "num_train_epochs": "epochs"}

    def config_of_older(*groups: Any) -> dict[str, Any]:
        return {older.get(name, name): value for name, value in public_config(*groups).items()}

    given: dict[str, Any] = {"enable_dp": True, "noise_multiplier": 1.0, "clip_norm": 1}
    with monkeypatch.context() as patch:
        patch.setattr(run, "public_config", config_of_older)
        main(flags(bert, data, tmp_path, **given))
    (tmp_path / "sst2" / "results.json").unlink()
    again = given | {"resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit):
        main(flags(bert, data, tmp_path, **again, block_size=12))
    assert "max_length was 16 in the checkpoint and is 12 now" in capsys.readouterr().err
    main(flags(bert, data, tmp_path, **again))
    assert results_of(tmp_path)["steps"] == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 7.5}, "learning_rate was 0.01 in the checkpoint and is 7.5 now"),
        ({"head_learning_rate": 0.3}, "head_learning_rate was 0.01 in the checkpoint and is 0.3 now"),
        ({"weight_decay": 0.1}, "weight_decay was 0.0 in the checkpoint and is 0.1 now"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type was 'linear' in the checkpoint and is 'constant' now"),
        ({"num_train_epochs": 0.8}, "steps was 2 in the checkpoint and is 4 now"),
        ({"seed": 9}, "seed was 0 in the checkpoint and is 9 now"),
        ({"clip_norm": 3}, "max_grad_norm was 1.0 in the checkpoint and is 3.0 now"),
        ({"model_name_or_path": "lively_bert"}, "checkpoint was '"),
    ],
)
def test_a_resumed_run_must_update_the_same(
    changed: dict[str, Any],
    named: str,
    bert: Path,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In full mode: no weight of the checkpoint is frozen."""
    given: dict[str, Any] = {"learning_rate": 0.01, "resume_from_checkpoint": "latest"}
    main(flags(bert, data, tmp_path, **given))
    (tmp_path / "sst2" / "results.json").unlink()
    if "model_name_or_path" in changed:
        changed = {"model_name_or_path": request.getfixturevalue(changed["model_name_or_path"])}
    with pytest.raises(SystemExit) as ended:
        main(flags(bert, data, tmp_path, **(given | changed)))
    assert ended.value.code == 2
    assert f"--resume_from_checkpoint: {named}" in capsys.readouterr().err
    main(flags(bert, data, tmp_path, **given))
    assert results_of(tmp_path)["learning_rate"] == 0.01


FINISHED: dict[str, Any] = {
    "enable_dp": True,
    "noise_multiplier": 1,
    "clip_norm": 0.5,
    "finetune_mode": "bias-only",
}


@pytest.fixture(scope="module")
def finished(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that has ended left."""
    out = tmp_path_factory.mktemp("finished")
    main(flags(bert, data, out, **FINISHED))
    assert "training_data" not in results_of(out)["settings"]
    return out


TOLD: list[tuple[dict[str, Any], str]] = [
    ({"noise_multiplier": 50}, "noise_multiplier was 1.0 in results.json and is 50.0 now"),
    ({"enable_dp": None, "noise_multiplier": None}, "delta was 0.001 in results.json and is None now"),
    ({"delta": 2e-3}, "delta was 0.001 in results.json and is 0.002 now"),
    ({"clip_norm": 3}, "clip_norm was 0.5 in results.json and is 3.0 now"),
    ({"finetune_mode": "last-layer"}, "finetune_mode was 'bias-only' in results.json and is 'last-layer' now"),
    ({"learning_rate": 0.3}, "learning_rate was 0.003 in results.json and is 0.3 now"),
    ({"batch_size": 20}, "expected_batch_size was 24 in results.json and is 20 now"),
    ({"max_train_examples": 110}, "num_examples was 120 in results.json and is 110 now"),
    ({"seed": 9}, "seed was 0 in results.json and is 9 now"),
    ({"num_train_epochs": 0.6}, "steps was 2 in results.json and is 3 now"),
    ({"insecure_test_seed": 1}, "insecure_test_seed was None in results.json and is 1 now"),
]


@pytest.mark.parametrize(("changed", "named"), TOLD)
def test_a_finished_task_is_kept_for_the_same_settings_only(
    changed: dict[str, Any],
    named: str,
    finished: Path,
    bert: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with pytest.raises(SystemExit) as ended:
        main(flags(bert, data, out, resume_from_checkpoint="latest", **FINISHED | changed))
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
    main(flags(bert, data, out, resume_from_checkpoint="latest", micro_batch_size=3, **FINISHED))
    assert "already finished" in capsys.readouterr().out


def test_a_folder_with_a_run_is_left_alone(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qnli").mkdir()
    (tmp_path / "qnli" / "diagnostics.jsonl").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(flags(bert, data, tmp_path, datasets="sst2 qnli"))
    assert ended.value.code == 2
    assert "holds a run already" in capsys.readouterr().err
    assert not (tmp_path / "sst2").exists(), "it is seen before anything is trained"


# --- mistakes ---


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"datasets": "sst2 qnli", "enable_dp": True, "noise_multiplier": 1, "dry_run": True, "finetune_mode": "ia3"}
    main(flags(bert, data, tmp_path / "out", **given))
    printed = capsys.readouterr().out
    for label in (
        "epsilon  ",
        "noise multiplier  ",
        "sampling probability",
        "steps  ",
        "trainable parameters",
        "clip norm",
        "which epsilon is that",
        "how much data",
    ):
        assert printed.count(label) == 2, label
    assert "draws cut at" not in printed
    main(flags(bert, data, tmp_path / "out", **given, max_batch=300))
    printed = capsys.readouterr().out
    for label in ("draws cut at           300 examples", "forward passes         at most"):
        assert printed.count(label) == 2, label
    main(flags(bert, data, tmp_path / "out", **given, noise_bands=2, batch_size=8))
    assert capsys.readouterr().out.count("noise bands            2: ") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", ["diagnostics.jsonl", "results.json"])
def test_a_dry_run_works_in_the_folder_of_a_run_with_other_settings(
    left: str, bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / left).write_text("{}")
    main(flags(bert, data, tmp_path, enable_dp=True, noise_multiplier=1, dry_run=True))
    assert "noise multiplier" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "sst2").iterdir()] == [left]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 121}, "--batch_size=121: sst2 has 120 training examples"),
        ({"delta": 0.01, "enable_dp": True}, "--delta=0.01: must be below 1/num_examples"),
        ({"block_size": 65}, "--block_size=65: the model's context is 64 tokens; give at most 64"),
        (
            {"block_size": 62, "finetune_mode": "soft-prompt"},
            "--block_size=62: the model's context is 64 tokens for text and 3 virtual tokens; give at most 61",
        ),
        ({"finetune_mode": "lora", "lora_target_modules": "nothing"}, "'nothing': matches no linear layer"),
        ({"finetune_mode": "nothing"}, "invalid choice: 'nothing'"),
        ({"datasets": "sst2 cola"}, "--datasets='cola'"),
        ({"datasets": "sst2 qnli", "resume_from_checkpoint": "x"}, "--resume_from_checkpoint='x': belongs to one task"),
        ({"model_name_or_path": "/nowhere"}, "--model_name_or_path='/nowhere': no tokenizer could be loaded"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    changes: dict[str, Any], message: str, bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags(bert, data, tmp_path / "out", **changes))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()  # what transformers says of a new head goes before
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert message in lines[-1]
    assert not (tmp_path / "out").exists()


def test_sharded_launches_are_refused(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit) as ended:
        main(flags(bert, data, tmp_path / "out"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "distributed_type='FSDP': classifiers are not sharded" in line
    assert not (tmp_path / "out").exists()


# --- two processes ---


def _train(_rank: int, _gather: Any, *lines: list[str]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # for accelerate; the group is there already
    Accelerator.end_training = lambda _: None  # it would leave the group, which `run_processes` ends
    for argv in lines:
        main(argv)


PLAIN = {"insecure_test_seed": 3, "num_train_epochs": 1, "eval_freq": 2, "optimizer": "sgd", "learning_rate": 0.5}
PRIVATE = {"enable_dp": True, "noise_multiplier": 1, "finetune_mode": "prefix+lora", "datasets": "sst2 qnli"}


@pytest.fixture(scope="module")
def both(still_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of a plain and a private run."""
    out = tmp_path_factory.mktemp("both")
    plain, private = (
        flags(still_bert, data, out / "plain", **PLAIN),
        flags(still_bert, data, out / "private", **PRIVATE),
    )
    run_processes(2, _train, plain, private)
    return out


def test_the_head_trains_at_its_own_rate(still_bert: Path, data: Path, tmp_path: Path) -> None:
    rates = {"optimizer": "adamw", "learning_rate": 1e-2, "head_learning_rate": 1e-9}
    main(flags(still_bert, data, tmp_path, **PLAIN | rates))
    set_seed(0)
    start, _ = load_classifier(str(still_bert), ("0", "1"), pad_token_id=0)
    moved = {name: (value - start.state_dict()[name]).abs().max() for name, value in weights_of(tmp_path).items()}
    assert moved["classifier.weight"] < 1e-6  # AdamW's steps are about as long as the rate
    assert moved["bert.encoder.layer.0.attention.self.query.weight"] > 1e-3


def test_two_processes_train_as_one(both: Path, still_bert: Path, data: Path, tmp_path: Path) -> None:
    """One draw between them, no row judged twice: rounding apart, the model of one process."""
    main(flags(still_bert, data, tmp_path, **PLAIN))
    one, two = weights_of(tmp_path), weights_of(both / "plain")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert results_of(tmp_path)["scores"] == results_of(both / "plain")["scores"]
    rows = [
        [json.loads(line) for line in (out / "sst2" / "diagnostics.jsonl").read_text().splitlines()[1:]]
        for out in (tmp_path, both / "plain")
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.get("batch_drawn") == theirs.get("batch_drawn")
        assert ours.get("eval_loss", 0.0) == pytest.approx(theirs.get("eval_loss", 0.0), rel=1e-4)


def test_two_processes_train_privately(both: Path) -> None:
    for task in ("sst2", "qnli"):
        report, found = report_of(both / "private", task), results_of(both / "private", task)
        assert Ledger(both / "private" / task / "ledger.jsonl").steps == report["steps"]
        assert (report["guarantee"], report["expected_batch_size"]) == ("dp", 24)
        assert found["epsilon"] == report["epsilon"] > 0
