"""The scripts as `accelerate launch` starts them with sharded weights, on one machine and on two."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dptune import add_lora, save_adapter
from dptune.ledger import Ledger
from dptune.lora import adapters
from tests.faults import write_examples
from tests.scripts.test_train_clm import flags
from tests.tiny import save_tiny, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
FSDP, TWO_MACHINES = CONFIGS / "accelerate_config.cfg", CONFIGS / "accelerate_config_two_machines.cfg"
NO_FSDP = CONFIGS / "accelerate_config_nofsdp.cfg"  # launched by test_train_clm.py and test_inference.py
IN_FLOAT32 = ("--mixed_precision", "no")  # figures are then the same on every processor
SHORT = {"num_train_epochs": None, "max_train_steps": 4}


def start(
    config: Path, *words: object, script: str, log: Path, options: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options, script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as file:
        return subprocess.Popen([*line, *map(str, words)], cwd=ROOT, env=environment, stdout=file, stderr=file)


def finish(process: subprocess.Popen[bytes], log: Path) -> str:
    """What it printed. Success is judged by its files, since gloo sometimes aborts a finished process."""
    try:
        process.wait(240)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its workers
        process.wait(60)
        raise
    return log.read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "data.json")


def report_of(out: Path, log: str) -> dict[str, Any]:
    path = out / "publish" / "privacy_report.json"
    assert path.exists(), log[-3000:]
    return json.loads(path.read_text())


def test_every_shipped_configuration_is_launched_by_a_test() -> None:
    assert set(CONFIGS.iterdir()) == {FSDP, TWO_MACHINES, NO_FSDP}
    launching = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    assert NO_FSDP.name in launching


@pytest.mark.parametrize("sync", ["gather", "reduce"])
def test_training_on_one_machine(sync: str, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    extra = {"gradient_sync": sync, "lora_target_modules": "lm_head", "validation_file": data}
    options = ("--fsdp_activation_checkpointing", "true") if sync == "reduce" else ()
    words, log = flags(tiny_model_dir, data, tmp_path / "out", **SHORT | extra), tmp_path / "log"
    printed = finish(start(FSDP, *words, script="train_clm.py", log=log, options=options), log)
    report = report_of(tmp_path / "out", printed)
    assert (report["guarantee"], report["steps"], report["expected_batch_size"]) == ("dp", 4, 32)
    assert Ledger(tmp_path / "out" / "ledger.jsonl").steps == 4
    assert "over 2 processes" in printed
    assert re.search(r"tokens at a time       \d+ \(\d+ x 48\) fit in memory", printed)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_loss"] != results["eval_loss_before"]


def test_training_in_four_bits(data: Path, tmp_path: Path) -> None:
    """It starts from the model that one process has with the whole quantised weights."""
    model, before, extra = save_tiny(tmp_path / "model", hidden=64), [], {"qbits": 4, "validation_file": data}
    for config in (FSDP, NO_FSDP):
        log, out = tmp_path / f"{config.stem}.log", tmp_path / config.stem
        words = flags(model, data, out, **SHORT | extra)
        options = ("--mixed_precision", "no")
        printed = finish(start(config, *words, script="train_clm.py", log=log, options=options), log)
        assert report_of(out, printed)["steps"] == 4
        assert ("over 2 processes" in printed) is (config == FSDP)
        before.append(json.loads((out / "all_results.json").read_text())["eval_loss_before"])
    assert before[0] == pytest.approx(before[1], rel=1e-6)


def test_a_whole_model_is_trained_in_shards_and_resumed_to_the_bit(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """Under a test seed. The run that is resumed lost what came after step 2, as a crash would lose it."""
    settings = {"lora_r": None, "trainable": "all", "checkpointing_steps": 2, "insecure_test_seed": 1}
    settings |= {"validation_file": data, "optimizer": "dp-adam", "learning_rate": 1e-3}
    words, logs = flags(tiny_model_dir, data, tmp_path / "out", **SHORT | settings), [tmp_path / "1", tmp_path / "2"]
    printed = finish(start(FSDP, *words, script="train_clm.py", log=logs[0], options=IN_FLOAT32), logs[0])
    report = report_of(tmp_path / "out", printed)
    assert (report["guarantee"], report["steps"]) == ("none", 4)
    assert "sharded weights        0.1 MiB per rank of 0.2 MiB over 2 processes" in printed
    assert "fit in memory" in printed
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]
    card = (tmp_path / "out" / "publish" / "README.md").read_text()
    assert 'from_pretrained(".")' in card

    whole = load_file(tmp_path / "out" / "publish" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "publish")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    words += ["--resume_from_checkpoint", "latest"]
    printed = finish(start(FSDP, *words, script="train_clm.py", log=logs[1], options=IN_FLOAT32), logs[1])
    assert report_of(tmp_path / "out", printed)["repeated_steps"] == 2
    again = load_file(tmp_path / "out" / "publish" / "model.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_training_on_two_machines(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Two launches that connect over loopback make one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = flags(tiny_model_dir, data, tmp_path / "out", **SHORT)
    logs = [tmp_path / "machine0.log", tmp_path / "machine1.log"]
    machines = [
        start(
            TWO_MACHINES,
            *words,
            script="train_clm.py",
            log=log,
            options=("--num_processes", "2", "--machine_rank", str(rank), "--main_process_port", port),
        )
        for rank, log in enumerate(logs)
    ]
    printed = "".join(finish(machine, log) for machine, log in zip(machines, logs, strict=True))
    assert report_of(tmp_path / "out", printed)["steps"] == 4
    assert "over 2 processes" in printed


def test_a_worker_that_dies_ends_the_launch_and_a_signal_saves_it(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    how: dict[str, object] = {"num_train_epochs": None, "max_train_steps": 100_000, "checkpointing_steps": 2}
    words = flags(tiny_model_dir, data, out, **how)
    running = start(FSDP, *words, script="train_clm.py", log=log)
    _wait_for(out / "checkpoint-4", running, log)
    os.kill(_worker_of(running.pid), signal.SIGKILL)
    began = time.monotonic()
    assert running.wait(90) != 0
    assert time.monotonic() - began < 60

    running = start(FSDP, *words, "--resume_from_checkpoint", "latest", script="train_clm.py", log=log)
    lines = Ledger(out / "ledger.jsonl").steps
    while (out / "ledger.jsonl").read_bytes().count(b"\n") < lines + 3:
        assert running.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    running.terminate()
    running.wait(90)
    saved = json.loads(max(out.glob("checkpoint-*/state.json"), key=lambda path: path.stat().st_mtime).read_text())
    assert "SIGTERM: stopped after step" in log.read_text()
    assert saved["ledger_steps"] == Ledger(out / "ledger.jsonl").steps, "the stop lost no step"


def _wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def _worker_of(launcher: int) -> int:
    """One of the processes that the launcher started (Linux)."""
    return int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[-1])


def test_sampling_gives_the_texts_of_one_process(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Five batches over two ranks: unequal work, and texts that end at different lengths."""
    torch.manual_seed(1)
    model = tiny_llama(vocab_size=400)
    add_lora(model, rank=4, alpha=8.0)
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.B.weight)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base_model="tiny")
    common = ["--dataset_name", "pubmed_generation", "--num_samples", 9, "--max_length", 24, "--batch_size", 2]
    common += ["--model_name_or_path", tiny_model_dir, "--lora_weights_path", tmp_path / "adapter"]
    script, texts = "inference_generation_dataset.py", {}
    for name, config, options in (("sharded", FSDP, ()), ("alone", NO_FSDP, ("--no_merge_lora",))):
        log = tmp_path / f"{name}.log"
        printed = finish(start(config, *common, "--output_dir", tmp_path / name, *options, script=script, log=log), log)
        assert (tmp_path / name / "generations.jsonl").exists(), printed[-3000:]
        texts[name] = (tmp_path / name / "generations.jsonl").read_bytes()
    assert texts["sharded"] == texts["alone"]
    assert "MiB per rank of " in (tmp_path / "sharded.log").read_text()


def test_ranks_whose_texts_end_at_different_times_do_not_hang(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One batch each: the rank with the long prompt has few tokens to draw, and must keep step with the other."""
    long = "Describe a process of making crepes in a pan, and then describe it again."
    (tmp_path / "instructions.txt").write_text(f"Say hello. #### 1\n{long} #### 1\n")
    words = ["--instruction_file", tmp_path / "instructions.txt", "--model_name_or_path", tiny_model_dir]
    words += ["--max_length", 60, "--batch_size", 1, "--output_dir", tmp_path / "out"]
    log = tmp_path / "log"
    printed = finish(start(FSDP, *words, script="inference_generation_instruction.py", log=log), log)
    assert (tmp_path / "out" / "generations.jsonl").exists(), printed[-3000:]
    assert len((tmp_path / "out" / "generations.jsonl").read_text().splitlines()) == 2
