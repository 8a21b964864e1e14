"""train_clm.py: launched for real with the shipped configuration, and the mistakes that users can make."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

import train_clm
from dptune import CausalLMLoss, InvalidArgument, attach_adapter
from dptune.accounting import Cut, epsilon
from dptune.accounting.rounding import rounded_up
from dptune.devices import has_fast_bfloat16
from dptune.ledger import Ledger
from dptune.lora import LoraAdapter
from dptune.report.check import check_publishable
from tests.tiny import tiny_tokenizer
from utils.data.load import load_training_data
from utils.generation.trained_style import style_of_training

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "accelerate_configs" / "accelerate_config_nofsdp.cfg"
REPORT_KEYS = {
    *("epsilon", "delta", "noise_multiplier", "clip_norm", "clipping", "sampling_probability"),
    *("expected_batch_size", "steps"),
    *("num_examples", "privacy_unit", "adjacency", "accountant", "sampler", "noise_source", "guarantee", "reasons"),
    "versions",
    "parts",
    "max_batch",
    "noise_bands",
    "average",
    *("repeated_steps", "unused_steps", "starts_from", "sampled", "method", "group_size"),
}
TOKEN = "hf_a_secret_that_must_not_appear"


@pytest.fixture(scope="module")
def train_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "my.json"
    rows = [(f"Repeat the word number {i % 7}.", "word " * (1 + i % 5) + "end") for i in range(64)]
    path.write_text(json.dumps({"instruction": [row[0] for row in rows], "answer": [row[1] for row in rows]}))
    return path


def flags(model: Path, data: Path, out: Path, **changes: object) -> list[str]:
    """A small run, with flags changed, added, or left out (None)."""
    settings: dict[str, object] = {
        "model_name_or_path": model,
        "train_file": data,
        "output_dir": out,
        "block_size": 48,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 5,
        "learning_rate": 0.02,
        "clip_norm": 1,
        "noise_multiplier": 0.8,
        "delta": None if changes.get("clip_norm") == -1 else 1e-3,
        "lora_r": None if changes.get("trainable") else 4,
    } | changes
    chosen = {name: value for name, value in settings.items() if value is not None}
    return [
        word
        for name, value in chosen.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def launch(
    *args: str, script: str = "train_clm.py", precision: Sequence[str] = ("--mixed_precision", "no")
) -> subprocess.CompletedProcess[str]:
    """Launch as a user would, in float32 so that figures are the same on every machine."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), *precision]
    command = [*launcher, script, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def launched(tiny_model_dir, train_file, tmp_path_factory):
    """A private run launched as a user would, with the token on the command line."""
    out = tmp_path_factory.mktemp("runs") / "private"
    extra = {"validation_file": train_file, "eval_freq": 10, "with_tracking": True, "access_token": TOKEN}
    extra |= {"num_warmup_steps": 2, "weight_decay": 0.01, "lora_target_modules": "lm_head", "noise_multiplier": 0.5}
    return launch(*flags(tiny_model_dir, train_file, out, **extra)), out


@pytest.mark.skipif(not has_fast_bfloat16(), reason="this processor multiplies float32 faster than bfloat16")
def test_the_launch_configurations_bf16_counts_on_a_processor_that_is_fast_in_it(tiny_model_dir, train_file, tmp_path):
    extra = {"validation_file": train_file, "eval_freq": 20, "noise_multiplier": 0.5}
    run = launch(*flags(tiny_model_dir, train_file, tmp_path / "run", **extra), precision=())
    assert run.returncode == 0, run.stderr
    assert "precision              bfloat16" in run.stdout
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]
    assert json.loads((tmp_path / "run" / "publish" / "privacy_report.json").read_text())["guarantee"] == "dp"


def test_a_launched_run_writes_all_promised_files(launched):
    result, out = launched
    assert result.returncode == 0, result.stderr
    beside = {"all_results.json", "diagnostics.jsonl", "diagnostics.png", "ledger.jsonl", "run_config.json", "publish"}
    assert {path.name for path in out.iterdir()} >= beside
    assert {path.name for path in (out / "publish").iterdir()} == {
        *("lora_weights.bin", "adapter_model.safetensors", "adapter_config.json"),
        *("privacy_report.json", "README.md", "epsilon.png", "ledger.jsonl", "dptune_settings.json"),
        *("SHA256SUMS", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (out / "publish" / "ledger.jsonl").read_bytes() == (out / "ledger.jsonl").read_bytes()
    assert style_of_training(out / "publish" / "lora_weights.bin") == "plain"
    assert list((out / "tracking" / "dptune").glob("events.*")), "--with_tracking leaves TensorBoard files"
    assert "epsilon" in result.stdout
    assert "epsilon=" in result.stderr, "the progress bar shows epsilon"


def test_the_report_states_what_the_ledger_holds(launched):
    _, out = launched
    report = json.loads((out / "publish" / "privacy_report.json").read_text())
    assert set(report) == REPORT_KEYS
    ledger = Ledger(out / "ledger.jsonl")
    assert report["guarantee"] == "dp"
    assert report["reasons"] == []
    assert report["steps"] == ledger.steps == 20  # 5 epochs of 64 examples in batches of 16
    assert report["epsilon"] == pytest.approx(ledger.epsilon(1e-3))
    assert report["sampling_probability"] == 16 / 64
    card = (out / "publish" / "README.md").read_text()
    for stated in (f"{report['epsilon']:.3f}"[:4], "0.001", "add or remove one", "Poisson", "PLD", "training example"):
        assert stated in card


def test_no_secret_and_no_training_text_is_written_anywhere(launched):
    result, out = launched
    assert TOKEN not in result.stdout + result.stderr
    for path in out.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path.name
            assert b"Repeat the word" not in path.read_bytes(), path.name


def test_the_adapter_learned_and_reloads_to_the_same_logits(launched, tiny_model_dir, train_file):
    _, out = launched
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"] - 0.05

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    ids = torch.arange(3, 40)[None]
    untrained = base(ids).logits
    ours = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    attach_adapter(ours, out)  # the folder of the run
    theirs = AutoPeftModelForCausalLM.from_pretrained(out / "publish").eval()
    assert (ours(ids).logits - untrained).abs().max() > 1e-2
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    data, _ = load_training_data(
        dataset_name=None,
        train_file=str(train_file),
        validation_file=None,
        prompt_style="plain",
        tokenizer=tokenizer,
        block_size=48,
    )
    with torch.no_grad():
        losses = CausalLMLoss(ours)(**data.batch(range(len(data)), 0))
    tokens = torch.as_tensor(data.num_answer_tokens)
    assert (losses * tokens).sum() / tokens.sum() == pytest.approx(results["eval_loss"], rel=1e-4)


def test_pubmed_abstracts_as_the_readme_trains_them(tiny_model_dir, tmp_path):
    folder = tmp_path / "data" / "pubmed"
    folder.mkdir(parents=True)
    texts = [f"We measured {i} patients and report what we found." for i in range(40)]
    (folder / "abstracts.jsonl").write_text("\n".join(json.dumps({"abstract": text}) for text in texts))
    out = tmp_path / "out"
    args = {"train_file": None, "dataset_name": "pubmed_generation", "data_dir": folder.parent, "max_train_steps": 2}
    train_clm.main(flags(tiny_model_dir, Path("-"), out, **args, noise_multiplier=1.2, gradient_ckpt=True))
    report = json.loads((out / "publish" / "privacy_report.json").read_text())
    assert (report["num_examples"], report["steps"], report["noise_multiplier"]) == (40, 2, 1.2)


def test_without_privacy_the_report_says_so_and_no_epsilon_is_stated(tiny_model_dir, train_file, tmp_path):
    out = tmp_path / "out"
    train_clm.main(flags(tiny_model_dir, train_file, out, clip_norm=-1, noise_multiplier=-1, max_train_steps=3))
    report = json.loads((out / "publish" / "privacy_report.json").read_text())
    assert (report["guarantee"], report["epsilon"]) == ("none", None)
    assert report["reasons"] == ["clipping and noise were turned off"]
    assert not (out / "publish" / "epsilon.png").exists()
    assert not (out / "ledger.jsonl").exists()
    assert not (out / "publish" / "ledger.jsonl").exists()
    assert (out / "publish" / "lora_weights.bin").exists()


def test_the_held_out_loss_is_measured_at_the_start_unless_told(tiny_model_dir, train_file, tmp_path, capsys):
    for name, at_start in (("with", None), ("without", True)):
        out, extra = tmp_path / name, {"validation_file": train_file, "no_eval_at_start": at_start}
        train_clm.main(flags(tiny_model_dir, train_file, out, max_train_steps=2, **extra))
        rows = [json.loads(line) for line in (out / "diagnostics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "eval_loss" in row] == ([0, 2] if at_start is None else [2])
        results = json.loads((out / "all_results.json").read_text())
        assert (results["eval_loss_before"] is None) == bool(at_start)
        assert ("before," in capsys.readouterr().out) == (at_start is None)


def test_a_text_without_a_prompt_is_learned_from_its_first_word(tiny_model_dir, tmp_path):
    """The model is an unconditional generator, sampled from the start token."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "you"}\n' * 64)
    out = tmp_path / "out"
    style = {
        "prompt_style": "uncond_generation",
        "clip_norm": -1,
        "noise_multiplier": -1,
        "lora_target_modules": "lm_head",
    }
    train_clm.main(flags(tiny_model_dir, tmp_path / "rows.jsonl", out, num_train_epochs=8, **style))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), out / "publish").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    start, first = torch.tensor([[tokenizer.bos_token_id]]), tokenizer("you", add_special_tokens=False).input_ids[0]
    before, after = (one(start).logits[0, -1].log_softmax(0)[first].item() for one in (model, trained))
    assert after > before + 1


def test_target_epsilon_is_kept(tiny_model_dir, train_file, tmp_path, capsys):
    out = tmp_path / "out"
    train_clm.main(
        flags(tiny_model_dir, train_file, out, noise_multiplier=None, target_epsilon=3, max_train_steps=4, lora_alpha=8)
    )
    report = json.loads((out / "publish" / "privacy_report.json").read_text())
    assert 2.9 < report["epsilon"] <= 3
    assert f"epsilon {rounded_up(report['epsilon'])}" in capsys.readouterr().out


def test_a_finished_run_takes_the_models_name_and_then_nothing_of_the_machine_is_published(
    tiny_model_dir, train_file, tmp_path, capsys
):
    out = tmp_path / "out"
    line = flags(tiny_model_dir, train_file, out, insecure_test_seed=None, max_train_steps=2)
    train_clm.main(line)
    assert f"{tiny_model_dir} is a path; to publish, resume with --base_model_name NAME" in capsys.readouterr().out
    with pytest.raises(InvalidArgument, match=r"adapter_config\.json.*is a path on this machine"):
        check_publishable(out / "publish")
    weights = (out / "publish" / "adapter_model.safetensors").read_bytes()
    named = [
        "--base_model_name",
        "ann/tiny",
        "--card_license",
        "mit",
        "--card_language",
        "en",
        "--card_data",
        "ann/rows",
    ]
    train_clm.main([*line, "--resume_from_checkpoint", "latest", *named])
    assert check_publishable(out / "publish").epsilon == Ledger(out / "ledger.jsonl").epsilon(1e-3)
    assert (out / "publish" / "adapter_model.safetensors").read_bytes() == weights
    for path in (out / "publish").iterdir():
        content = path.read_bytes()
        assert not [word for word in (tmp_path, tiny_model_dir, train_file) if str(word).encode() in content], path
    front = huggingface_hub.metadata_load(out / "publish" / "README.md")
    known = {"base_model": "ann/tiny", "license": "mit", "language": ["en"], "datasets": ["ann/rows"]}
    assert front | known == front
    recipe = " ".join((out / "publish" / "README.md").read_text().replace("\\\n", " ").split())
    for words in (
        "train_clm.py --output_dir OUT --model_name_or_path ann/tiny",
        "--train_file TRAIN_FILE",
        "--max_train_steps 2",
        "--lora_r",
        "--learning_rate",
        "--noise_multiplier",
    ):
        assert words in recipe, words


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_model_dir, train_file, tmp_path, capsys):
    out = tmp_path / "out"
    train_clm.main(flags(tiny_model_dir, train_file, out, dry_run=True))
    printed = capsys.readouterr().out
    for label in ("epsilon", "noise multiplier", "sampling probability", "steps", "trainable parameters", "memory"):
        assert label in printed
    assert not out.exists()


def test_a_file_that_names_users_is_refused_unless_told(tiny_model_dir, tmp_path, capsys):
    rows = [{"instruction": f"Say {n}.", "answer": "yes", "email": f"{n % 9}@example.org"} for n in range(64)]
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = flags(tiny_model_dir, tmp_path / "users.jsonl", tmp_path / "out", dry_run=True)
    with pytest.raises(SystemExit):
        train_clm.main(line)
    shown = capsys.readouterr().err
    assert "names users in email; give --privacy_unit email, or --ignore_users" in shown
    assert "@" not in shown
    train_clm.main([*line, "--ignore_users"])
    assert "sampling probability" in capsys.readouterr().out


def test_held_out_data_without_an_answer_end_the_run_before_the_model_is_loaded(
    tiny_model_dir, train_file, tmp_path, capsys
):
    """Every prompt is longer than the block, so that no answer token is left."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"instruction": "word " * 200, "answer": "yes"}) + "\n")
    with pytest.raises(SystemExit):
        train_clm.main(flags(tiny_model_dir, train_file, tmp_path / "out", validation_file=held_out, dry_run=True))
    assert "no held-out example has an answer token" in capsys.readouterr().err


def test_the_seed_changes_the_adapters_start_and_nothing_makes_two_runs_equal(tiny_model_dir, train_file, tmp_path):
    states = []
    for name in ("one", "other"):
        train_clm.main(flags(tiny_model_dir, train_file, tmp_path / name, max_train_steps=1, seed=5))
        states.append(torch.load(tmp_path / name / "publish" / "lora_weights.bin", weights_only=True))
    key = next(key for key in states[0] if key.endswith("lora.B.weight"))
    assert not torch.equal(states[0][key], states[1][key])  # the same seed, other draws and other noise


@pytest.mark.parametrize("validated", [True, False])
def test_activation_checkpointing_recomputes_with_and_without_validation_data(
    validated, tiny_model_dir, train_file, tmp_path, monkeypatch
):
    """transformers silently skips it for a model in evaluation mode.

    A forward pass that runs inside a backward pass computes again. The check before training makes none.
    """
    forward, recomputed = LoraAdapter.forward, {"with": 0, "without": 0}

    def counted(self, x):
        recomputed[name] += torch._C._current_graph_task_id() != -1
        return forward(self, x)

    monkeypatch.setattr(LoraAdapter, "forward", counted)
    changes = {"max_train_steps": 2, "insecure_test_seed": 1, "eval_at_start": validated}
    changes["validation_file"] = train_file if validated else None
    for name, recompute in (("with", True), ("without", None)):
        train_clm.main(flags(tiny_model_dir, train_file, tmp_path / name, gradient_ckpt=recompute, **changes))
    assert recomputed["with"] > 0
    assert recomputed["without"] == 0


MISTAKES = {
    "neither noise flag": ({"noise_multiplier": None}, "--noise_multiplier", "exactly one"),
    "both noise flags": ({"target_epsilon": 3}, "--target_epsilon=3", "not both"),
    "clip without noise": ({"noise_multiplier": -1}, "--noise_multiplier=-1", "both"),
    "noise without clip": ({"clip_norm": -1}, "--noise_multiplier=0.8", "--clip_norm is -1"),
    "target out of reach": (
        {"noise_multiplier": None, "target_epsilon": 1e-9, "delta": 1e-7},
        "target_epsilon=1e-09",
        "fewer steps",
    ),
    "q over 1": ({"gradient_accumulation_steps": 17}, "--gradient_accumulation_steps=17", "lower it"),
    "delta of 1/n": ({"delta": 1 / 64}, "delta=0.015625", "below 1/num_examples"),
    "unknown target": ({"lora_target_modules": "w_proj"}, "lora_target_modules='w_proj'", "q_proj"),
    "unknown flag": ({"clip_nrom": 1}, "--clip_nrom", "did you mean --clip_norm"),
    "no such model": ({"model_name_or_path": "no/where"}, "--model_name_or_path='no/where'", "--access_token"),
    "no such file": ({"train_file": "missing.json"}, "--train_file", "missing.json"),
    "two data sets": ({"dataset_name": "pubmed_generation"}, "--train_file", "exactly one"),
    "block too small": ({"block_size": 1}, "--block_size=1", "at least 2"),
    "block beyond the model": ({"block_size": 4096}, "--block_size=4096", "256"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy_and_status_2(name, tiny_model_dir, train_file, tmp_path, capsys):
    changes, *wanted = MISTAKES[name]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        train_clm.main(flags(tiny_model_dir, train_file, out, **changes))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for part in wanted:
        assert part in error
    assert not out.exists()


@pytest.mark.parametrize(
    "unread", [{"target_epsilon": 8}, {"delta": 1e-7}, {"clipping": "flat"}, {"adaptive_quantile": 0.3}]
)
def test_a_setting_of_privacy_is_refused_without_privacy_before_anything_is_read(unread, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(SystemExit) as stopped:
        train_clm.main(flags(nowhere, nowhere, tmp_path / "out", clip_norm=-1, noise_multiplier=-1, **unread))
    assert stopped.value.code == 2
    ((name, _),) = unread.items()
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: --{name}=")
    assert "is not read without privacy: leave it out, or give --clip_norm and --noise_multiplier" in error


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory):
    """A tiny Gemma 3 that reads text and images."""
    folder, tokenizer = tmp_path_factory.mktemp("gemma3"), tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer) + 3, "sliding_window": 64}
    tokens = {"image_token_index": text["vocab_size"] - 3, "boi_token_index": 3, "eoi_token_index": 4}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_layers_that_text_does_not_reach_are_refused_before_the_first_step(two_towers, train_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_clm.main(flags(two_towers, train_file, tmp_path / "out"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: model\.vision_tower\..*\.lora\.A\.weight: the losses do not reach it and 5 other", error)
    assert "such as model.language_model.layers.0.self_attn.*" in error
    assert not (tmp_path / "out" / "ledger.jsonl").exists()


def test_a_pattern_adapts_only_the_layers_that_text_reaches(two_towers, train_file, tmp_path):
    targets = {"lora_target_modules": "*.language_model.*.q_proj", "max_train_steps": 1, "num_train_epochs": None}
    train_clm.main(flags(two_towers, train_file, tmp_path / "out", **targets))
    state = torch.load(tmp_path / "out" / "publish" / "lora_weights.bin", weights_only=True)
    assert {name.rpartition(".lora.")[0] for name in state} == {"model.language_model.layers.0.self_attn.q_proj"}


BAD_FILES = {
    "unequal lists": ('{"instruction": ["a", "b"], "answer": ["c"]}', "2"),
    "missing column": ('{"instruction": ["a", "b"]}', "answer"),
    "empty file": ("", "empty"),
    "unreadable JSON": ('{"instruction": [', "JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_one_line_and_status_2(name, tiny_model_dir, tmp_path, capsys):
    content, wanted = BAD_FILES[name]
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        train_clm.main(flags(tiny_model_dir, tmp_path / "bad.json", tmp_path / "out"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --train_file")
    assert wanted in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_run_is_left_alone(launched, tiny_model_dir, train_file, capsys):
    _, out = launched
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train_clm.main(flags(tiny_model_dir, train_file, out))
    assert stopped.value.code == 2
    assert "holds a run already" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_a_mistake_in_a_separate_process_prints_no_traceback(tiny_model_dir, train_file, tmp_path):
    args = flags(tiny_model_dir, train_file, tmp_path / "out", noise_multiplier=None)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "train_clm.py", *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_rows_of_files_with_weights_are_drawn_and_accounted_by_them(tiny_model_dir, train_file, tmp_path, capsys):
    """Planned, reported and resumed with the largest probability: 16 / (64 / 4 + 48)."""
    more = tmp_path / "more.jsonl"
    more.write_text(
        "".join(json.dumps({"instruction": f"Say {i}.", "answer": f"It is {i}."}) + "\n" for i in range(48))
    )
    line = flags(tiny_model_dir, None, tmp_path / "run", num_train_epochs=None, max_train_steps=2)
    files = ["--train_file", str(train_file), str(more), "--train_file_weights"]
    train_clm.main([*line, *files, "1", "4"])
    told = capsys.readouterr().out
    assert (
        "sampling probability   0.25, the largest\nweights                64 with weight 1, 48 with weight 4\n" in told
    )
    report = json.loads((tmp_path / "run" / "publish" / "privacy_report.json").read_text())
    assert (report["sampling_probability"], report["num_examples"]) == (0.25, 112)
    assert report["parts"] == {"sizes": [64, 48], "weights": [1.0, 4.0]}
    assert report["epsilon"] == pytest.approx(Ledger(tmp_path / "run" / "ledger.jsonl").epsilon(1e-3))
    assert "Largest sampling probability" in (tmp_path / "run" / "publish" / "README.md").read_text()


@pytest.mark.parametrize(
    ("weights", "changes", "told"),
    [
        (["1", "4"], {}, "--train_file_weights='1 4': give one for each value of --train_file, which has 1"),
        (["0"], {}, "--train_file_weights=0.0: "),
        (["1"], {"privacy_unit": "user", "examples_per_unit": 2}, "an author of --privacy_unit user may have rows"),
        (["1"], {"train_file": None, "dataset_name": "pubmed_generation"}, "--train_file_weights='1': belongs to"),
    ],
)
def test_weights_that_fit_nothing_are_refused(weights, changes, told, tiny_model_dir, train_file, tmp_path, capsys):
    line = flags(tiny_model_dir, train_file, tmp_path / "out", **changes)
    with pytest.raises(SystemExit):
        train_clm.main([*line, "--train_file_weights", *weights])
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cut_draws_are_planned_trained_reported_and_resumed(tiny_model_dir, train_file, tmp_path, capsys):
    line = flags(tiny_model_dir, train_file, tmp_path / "run", num_train_epochs=None, max_train_steps=2, max_batch=18)
    train_clm.main([*line, "--dry_run"])
    told = capsys.readouterr().out
    assert "draws cut at           18 examples\n" in told
    assert re.search(r"forward passes +at most \d+ per step on each process", told)
    train_clm.main([*line, "--checkpointing_steps", "1", "--base_model_name", "ann/base"])
    folder = tmp_path / "run" / "publish"
    report = json.loads((folder / "privacy_report.json").read_text())
    assert (report["max_batch"], report["sampler"]) == (18, "Poisson, cut at 18 examples")
    assert report["epsilon"] == check_publishable(folder).epsilon == Ledger(folder / "ledger.jsonl").epsilon(1e-3)
    setting = {"noise_multiplier": 0.8, "sampling_probability": 0.25, "steps": 2, "delta": 1e-3}
    assert report["epsilon"] == pytest.approx(epsilon(**setting, cut=Cut(18, 64))) != epsilon(**setting)
    resumed = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    with pytest.raises(SystemExit):
        train_clm.main([*line[: line.index("--max_batch")], *resumed])
    assert "max_batch was 18 in the checkpoint and is None now" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_clm.main(flags(tiny_model_dir, train_file, tmp_path / "other", max_batch=15))
    assert "--max_batch=15: most draws would be cut" in capsys.readouterr().err


def test_noise_bands_are_planned_trained_reported_and_resumed(tiny_model_dir, train_file, tmp_path, capsys):
    line = flags(tiny_model_dir, train_file, tmp_path / "run", num_train_epochs=None, max_train_steps=3, noise_bands=2)
    train_clm.main([*line, "--dry_run"])
    assert re.search(r"noise bands +2: \d+% (less|MORE) noise in the sums over steps than", capsys.readouterr().out)
    train_clm.main([*line, "--checkpointing_steps", "2", "--base_model_name", "ann/base"])
    folder = tmp_path / "run" / "publish"
    report = json.loads((folder / "privacy_report.json").read_text())
    assert (report["noise_bands"], report["sampler"]) == (2, "Poisson, cyclic: 2 groups of examples take turns")
    turns = epsilon(noise_multiplier=0.8, sampling_probability=2 * 0.25, steps=2, delta=1e-3)
    assert report["epsilon"] == check_publishable(folder).epsilon == turns
    assert "--noise_bands 2 " in (folder / "README.md").read_text().replace("\\\n", " ")
    resumed = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    with pytest.raises(SystemExit):
        train_clm.main([*line[: line.index("--noise_bands")], "--optimizer", "lowpass-adam", *resumed])
    assert "noise_bands was '2' in the checkpoint and is '1' now" in capsys.readouterr().err
    train_clm.main([*line, *resumed])
    ledger = Ledger(folder / "ledger.jsonl")
    assert (ledger.steps, ledger.turns) == (4, 2 + 1)
    assert json.loads((folder / "privacy_report.json").read_text())["epsilon"] == ledger.epsilon(1e-3) > turns


@pytest.mark.parametrize(
    ("bands", "told"),
    [
        ("many", "--noise_bands='many': give a whole number"),
        ("auto", "--noise_bands='auto': is chosen for a target epsilon"),
        ("5", "--noise_bands=5: rows would be drawn with probability 1.25"),
    ],
)
def test_noise_bands_that_cannot_be_are_refused(bands, told, tiny_model_dir, train_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_clm.main(flags(tiny_model_dir, train_file, tmp_path / "out", noise_bands=bands))
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
