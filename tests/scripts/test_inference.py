"""Both inference scripts, launched as a user launches them, on a tiny model."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import inference_generation_dataset
import inference_generation_instruction
from dptune import add_lora, save_adapter
from dptune._validate import InvalidArgument
from dptune.lora import adapters
from dptune.run.lock import LOCK_NAME, FolderLock
from tests.completion_server import CompletionServer, running
from tests.tiny import save_tiny, tiny_llama
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.files.journal import Journal
from utils.generation import run
from utils.generation.arguments import AdapterArguments, SamplingArguments
from utils.generation.run import sample_instructions
from utils.models.arguments import ModelArguments
from utils.models.loading import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "accelerate_configs/accelerate_config_nofsdp.cfg"
PYTHON = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--mixed_precision", "no"]
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DATASET, INSTRUCTION = "inference_generation_dataset.py", "inference_generation_instruction.py"


def _environment() -> dict[str, str]:
    here = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **here}


def _launch(launcher: list[str], script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    line = [*launcher, script, *map(str, flags)]
    return subprocess.run(line, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=240)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


def _dataset_flags(model: Path, output: Path) -> list[object]:
    flags = ["--dataset_name", "pubmed_generation", "--num_samples", 40, "--max_length", 32, "--batch_size", 2]
    return [*flags, "--model_name_or_path", model, "--output_dir", output]


def _instruction_flags(model: Path, file: Path, output: Path) -> list[object]:
    flags: list[object] = ["--instruction_file", file, "--model_name_or_path", model, "--output_dir", output]
    return [*flags, "--max_length", 64]


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny model that changes what it writes."""
    torch.manual_seed(1)
    model, folder = tiny_llama(vocab_size=400), tmp_path_factory.mktemp("adapter")
    add_lora(model, rank=4, alpha=8.0)
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.B.weight)
    save_adapter(model, folder, base_model="tiny")
    return folder


@pytest.fixture(scope="module")
def whole_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset run that nothing interrupted, by `accelerate launch`."""
    output = tmp_path_factory.mktemp("whole") / "generations"
    done = _launch(ACCELERATE, DATASET, *_dataset_flags(tiny_model_dir, output))
    assert done.returncode == 0, done.stderr
    assert f"40 texts in {output}/generations.jsonl" in done.stdout
    assert "tokens/s" in done.stderr
    return output


def test_the_dataset_script_writes_every_sample(whole_run: Path) -> None:
    rows = _rows(whole_run)
    assert [row["index"] for row in rows] == list(range(40))
    assert {row["prompt"] for row in rows} == {"Abstract: "}
    assert len({row["text"] for row in rows}) == 40
    assert sorted(path.name for path in whole_run.iterdir()) == [
        ".lock",
        "generation_config.json",
        "generations.jsonl",
        "summary.json",
    ]


def _kill_after_four_texts(flags: list[object], output: Path) -> None:
    """Start the data set's script and kill it once it has four texts, before it has all 40."""
    rank_file = output / "generations.rank0.jsonl"
    line = [*PYTHON, DATASET, *map(str, flags)]
    killed = subprocess.Popen(line, cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (rank_file.exists() and rank_file.read_bytes().count(b"\n") >= 4):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no text within 200 s"
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert 4 <= rank_file.read_bytes().count(b"\n") < 40


def test_a_killed_run_continues_on_two_ranks_to_the_same_texts(
    whole_run: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    flags = _dataset_flags(tiny_model_dir, tmp_path)
    _kill_after_four_texts(flags, tmp_path)
    # Judged by the file: a process group's exit on a CPU sometimes aborts after all is written.
    done = _launch(TWO_RANKS, DATASET, *flags)
    assert (tmp_path / "generations.jsonl").exists(), done.stderr
    assert (tmp_path / "generations.jsonl").read_bytes() == (whole_run / "generations.jsonl").read_bytes()
    assert not list(tmp_path.glob("generations.rank*"))


class Stopped(BaseException):
    """Ends a run at once."""


def _stop_after_four_texts(flags: list[object], output: Path) -> list[dict[str, Any]]:
    """Run the data set's script here, stop it once it has four texts, and return the rows that it left: not all."""
    append = run.append_generations

    def appending(*args: Any) -> None:
        append(*args)
        if (output / "generations.rank0.jsonl").read_bytes().count(b"\n") >= 4:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "append_generations", appending)
        with pytest.raises(Stopped):
            _run_here(inference_generation_dataset, *flags)
    gc.collect()  # the error holds the drawing, which would go on beside the next run
    left = [json.loads(line) for line in (output / "generations.rank0.jsonl").read_bytes().splitlines()]
    assert 4 <= len(left) < 12
    return left


def test_a_stopped_continuous_run_loses_nothing_and_repeats_nothing(
    tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    flags = [*_dataset_flags(tiny_model_dir, tmp_path), "--num_samples", 12]
    flags += ["--backend", "continuous", "--lora_weights_path", adapter_dir]
    left = _stop_after_four_texts(flags, tmp_path)
    _run_here(inference_generation_dataset, *flags)
    rows = _rows(tmp_path)
    assert [row["index"] for row in rows] == list(range(12))
    assert all(row in rows for row in left)
    assert len({row["text"] for row in rows}) == 12  # the second run has random numbers of its own
    assert not list(tmp_path.glob("generations.rank*"))


def test_a_stopped_run_by_a_server_asks_for_no_finished_text_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    with running(CompletionServer(delay=0.02)) as server:
        flags = [*_dataset_flags(tiny_model_dir, tmp_path), "--backend", "vllm", "--vllm_url", server.url]
        left = _stop_after_four_texts(flags, tmp_path)
        _run_here(inference_generation_dataset, *flags)
    rows = _rows(tmp_path)
    assert [row["index"] for row in rows] == list(range(40))
    assert all(row in rows for row in left)
    asked = Counter(f"text of {body['seed']}" for body in server.requests)
    assert asked.keys() == {row["text"] for row in rows}
    assert {asked[row["text"]] for row in left} == {1}
    assert len(server.requests) <= 40 + 2  # only what was in work when the run was stopped is asked for again


def test_another_model_on_the_server_is_another_configuration(
    tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(CompletionServer(models=("base", "dptune"))) as server:
        flags = [*_dataset_flags(tiny_model_dir, tmp_path), "--backend", "vllm", "--vllm_url", server.url]
        _run_here(inference_generation_dataset, *flags, "--vllm_model", "dptune")
        with pytest.raises(SystemExit):
            _run_here(inference_generation_dataset, *flags, "--vllm_model", "base")
    assert "vllm_model was 'dptune' and is 'base'" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        _run_here(inference_generation_dataset, *_dataset_flags(tiny_model_dir, tmp_path))
    assert "backend was 'vllm' and is None" in capfd.readouterr().err


def test_a_folder_from_before_there_were_backends_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    flags = [*_dataset_flags(tiny_model_dir, tmp_path), "--num_samples", 2]
    _run_here(inference_generation_dataset, *flags)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    for name in ("backend", "stop"):
        assert config.pop(name) is None
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    _run_here(inference_generation_dataset, *flags)


def test_unconditional_instructions_are_written_with_their_ids(
    tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "instructions.txt", tmp_path / "out"
    file.write_text(" #### 6\n")
    flags = [*_instruction_flags(tiny_model_dir, file, output), "--prompt_style", "uncond_generation", "--stop", "e"]
    _run_here(inference_generation_instruction, *flags)
    rows = _rows(output)
    assert {row["prompt"] for row in rows} == {""}
    assert not any("e" in row["text"] for row in rows)
    lines = [json.loads(line) for line in (output / "instructions.jsonl").read_text().splitlines()]
    kept = {f"syn-{row['index']}": row["text"] for row in rows if row["ended"] and row["text"].strip()}
    assert kept
    assert {line["id"]: line["instruction"] for line in lines}.items() <= kept.items()
    assert {line["instruction"] for line in lines} == set(kept.values())
    assert "6 texts ended before the length limit" in capfd.readouterr().out


def test_alpaca_evals_instructions_give_its_outputs(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = [{"instruction": f"Question {number}", "dataset": "koala"} for number in range(3)]
    (tmp_path / "eval.json").write_text(json.dumps(asked))
    flags = [*_instruction_flags(tiny_model_dir, tmp_path / "eval.json", tmp_path / "my_model"), "--max_length", 20]
    _run_here(inference_generation_instruction, *flags)
    outputs = json.loads((tmp_path / "my_model" / "alpaca_eval.json").read_text())
    texts = [row["text"] for row in _rows(tmp_path / "my_model")]
    assert outputs == [one | {"output": text, "generator": "my_model"} for one, text in zip(asked, texts, strict=True)]
    (tmp_path / "plain.txt").write_text("Question 0\nQuestion 1\n")
    flags = [*_instruction_flags(tiny_model_dir, tmp_path / "plain.txt", tmp_path / "plain"), "--max_length", 20]
    _run_here(inference_generation_instruction, *flags)
    assert not (tmp_path / "plain" / "alpaca_eval.json").exists()
    _run_here(inference_generation_instruction, *flags, "--alpaca_eval_output", "--generator_name", "other")
    outputs = json.loads((tmp_path / "plain" / "alpaca_eval.json").read_text())
    assert [set(row) for row in outputs] == [{"instruction", "output", "generator"}] * 2
    assert outputs[0]["generator"] == "other"


def test_the_instruction_script_samples_with_an_adapter(
    tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "instructions.txt"
    file.write_text("Say hello. #### 2\n\nFirst line\\nsecond line #### 1\n", encoding="utf-8")
    flags = [*_instruction_flags(tiny_model_dir, file, tmp_path / "out"), "--temperature", 0]
    done = _launch(ACCELERATE, INSTRUCTION, *flags, "--lora_weights_path", adapter_dir / "lora_weights.bin")
    assert done.returncode == 0, done.stderr
    prompts = ["Say hello.\n", "Say hello.\n", "First line\nsecond line\n"]
    assert [(row["index"], row["prompt"]) for row in _rows(tmp_path / "out")] == list(enumerate(prompts))
    flags = [*_instruction_flags(tiny_model_dir, file, tmp_path / "base"), "--temperature", 0]
    _run_here(inference_generation_instruction, *flags)
    base, adapted = ([row["text"] for row in _rows(tmp_path / name)] for name in ("base", "out"))
    assert all(one != other for one, other in zip(base, adapted, strict=True))


def test_a_mistake_is_one_line_with_status_2(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "instructions.txt"
    file.write_text("fine #### 1\nno repetitions here\n")
    done = _launch(PYTHON, INSTRUCTION, *_instruction_flags(tiny_model_dir, file, tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --instruction_file='{file}': line 2 has no ####; write `instruction #### repetitions`\n"
    )
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def _run_here(script: Any, *flags: object) -> None:
    """The script within this process: parse and run, without an interpreter's start."""
    groups = {
        inference_generation_dataset: inference_generation_dataset.DatasetPromptArguments,
        inference_generation_instruction: inference_generation_instruction.InstructionArguments,
    }
    shared = (script.ModelArguments, script.AdapterArguments, script.SamplingArguments)
    with exit_on_invalid_argument():
        script.main(*parse(groups[script], *shared, args=[str(flag) for flag in flags]))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model_name_or_path", "OTHER", "--lora_weights_path", "ADAPTER"], "another model"),
        (["--lora_weights_path", "ADAPTER/absent.bin"], "--lora_weights_path="),
        (["--model_name_or_path", "ADAPTER/absent"], "--model_name_or_path="),
        (["--max_length", "2"], "--max_length=2: prompt 1 of 40 alone has"),
        (["--max_length", "512"], "--max_length=512"),
        (["--num_samples", "0"], "--num_samples=0"),
        (["--dataset_name", "other"], "--dataset_name"),
        (["--backend", "other"], "--backend"),
        (["--prompt_style", "uncond_generation"], "--prompt_style='uncond_generation': takes no instruction"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    flags: list[str],
    expected: str,
    tiny_model_dir: Path,
    adapter_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    other = save_tiny(tmp_path / "other", hidden=64)
    capfd.readouterr()  # what saving printed
    flags = [flag.replace("OTHER", str(other)).replace("ADAPTER", str(adapter_dir)) for flag in flags]
    with pytest.raises(SystemExit) as exit_:
        _run_here(inference_generation_dataset, *_dataset_flags(tiny_model_dir, tmp_path / "out"), *flags)
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert exit_.value.code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert expected in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_pad_token_without_an_embedding_is_refused_before_the_model_is_loaded(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "padded")
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    (tmp_path / "i.txt").write_text("Hi #### 2\n")
    with pytest.raises(InvalidArgument, match=r"--model_name_or_path=.*pads with token \d+ \(\[PAD\]\)"):
        sample_instructions(
            ["Hi"],
            ModelArguments(model_name_or_path=str(model)),
            AdapterArguments(),
            SamplingArguments(output_dir=str(tmp_path / "out"), max_length=30),
        )
    assert not (tmp_path / "out").exists()


def test_an_adapter_trained_again_is_another_configuration(
    tiny_model_dir: Path, adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "lora_weights.bin"
    weights.write_bytes((adapter_dir / "lora_weights.bin").read_bytes())
    flags = [*_dataset_flags(tiny_model_dir, tmp_path / "out"), "--num_samples", 2, "--lora_weights_path", weights]
    _run_here(inference_generation_dataset, *flags)
    _run_here(inference_generation_dataset, *flags, "--batch_size", 7)  # speed only: the same configuration
    state = torch.load(weights, weights_only=True)
    torch.save({name: tensor * 2 for name, tensor in state.items()}, weights)
    with pytest.raises(SystemExit):
        _run_here(inference_generation_dataset, *flags)
    assert "adapter_sha256 was" in capsys.readouterr().err


def test_a_whole_model_trained_again_is_another_configuration(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder has the old name, and texts of the first may have no privacy."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    flags = [*_dataset_flags(model, tmp_path / "out"), "--num_samples", 2]
    _run_here(inference_generation_dataset, *flags)
    _run_here(inference_generation_dataset, *flags)
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        _run_here(inference_generation_dataset, *flags)
    assert "weights_sha256 was" in capsys.readouterr().err


def test_a_folder_in_which_another_process_draws_is_left_alone(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*_dataset_flags(tiny_model_dir, tmp_path), "--num_samples", 2]
    with FolderLock() as lock:
        lock.take(tmp_path)
        with pytest.raises(SystemExit):
            _run_here(inference_generation_dataset, *flags)
    assert "another process is at work in it" in capsys.readouterr().err
    _run_here(inference_generation_dataset, *flags)


def test_a_new_folder_is_locked_before_anything_is_written_in_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, claim, folder = [], Journal.claim, tmp_path / "new"

    def claiming(journal: Journal, identity: Mapping[str, object]) -> None:
        found.extend(path.name for path in folder.iterdir())
        with FolderLock() as other, pytest.raises(InvalidArgument, match="another process is at work in it"):
            other.take(folder)
        claim(journal, identity)

    monkeypatch.setattr(Journal, "claim", claiming)
    _run_here(inference_generation_dataset, *_dataset_flags(tiny_model_dir, tmp_path / "new"), "--num_samples", 2)
    assert found == [LOCK_NAME]


def test_no_token_is_saved(tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = [*_dataset_flags(tiny_model_dir, tmp_path), "--num_samples", 1, "--access_token", "hf_secret"]
    _run_here(inference_generation_dataset, *flags)
    printed = capfd.readouterr()
    saved = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "hf_secret" not in saved + printed.out + printed.err
