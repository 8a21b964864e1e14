"""`DPTrainer` on two processes: the same draw, gradient and weights as on one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dptune import InvalidArgument, Ledger
from dptune.integrations.processes import ranks_of_launch
from dptune.integrations.transformers import TrainingArguments
from dptune.ledger import LEDGER_NAME
from dptune.run import session
from dptune.run.plan import RunPlan
from tests.dptune.integrations.runs import GradientLog, Silent, dp_trainer, lora_llama, privacy_arguments
from tests.processes import run_processes

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from transformers import HfArgumentParser
from dptune.integrations.transformers import DPTrainer, PrivacyArguments, TrainingArguments
from tests.dptune.integrations.runs import Collator, data, lora_llama
args, privacy = HfArgumentParser((TrainingArguments, PrivacyArguments)).parse_args_into_dataclasses()
DPTrainer(lora_llama(), args, Collator(), data(), privacy_args=privacy).train()
"""


def as_launched() -> None:
    """Environment variables that torchrun sets and `run_processes` does not."""
    os.environ |= {"MASTER_ADDR": "localhost", "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}


def train_without_noise(rank: int, _gather: Any, folder: Path) -> tuple[torch.Tensor, list[float], bool]:
    """(weights, logged losses, whether the model was left unwrapped) after three steps."""
    as_launched()
    session.GaussianNoise = Silent  # type: ignore[misc]
    model = lora_llama(rank)  # each rank begins with other weights: the main process's must be used
    trainer = dp_trainer(
        folder,
        model,
        max_steps=3,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=6 // int(os.environ["WORLD_SIZE"]),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return flat, losses, trainer.model_wrapped is model


def first_gradient(rank: int, _gather: Any, folder: Path) -> torch.Tensor:
    """The gradient of a step with so much noise that it hides everything else."""
    as_launched()
    log = GradientLog()
    privacy = privacy_arguments(noise_multiplier=500.0, insecure_test_seed=None)
    dp_trainer(
        folder, lora_llama(), privacy=privacy, callbacks=[log], max_steps=1, per_device_train_batch_size=1
    ).train()
    assert (folder / LEDGER_NAME).exists() or rank
    return log.grads[0]


def secret_draws(_rank: int, _gather: Any, folder: Path) -> list[list[int]]:
    as_launched()
    TrainingArguments(use_cpu=True)  # makes accelerate's state, as a run does
    sampler = session.PrivateRun(RunPlan(None, 1000, 100, 1), folder, ranks_of_launch()).sampler()
    assert sampler.keystream.secret
    return [sampler.draw().tolist() for _ in range(3)]


def refusal(rank: int, _gather: Any, folder: Path) -> str:
    as_launched()
    (folder / LEDGER_NAME).write_text("what an earlier run left\n")
    with pytest.raises(InvalidArgument, match="holds a run already") as error:
        dp_trainer(folder, lora_llama(rank)).train()
    return str(error.value)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (alone,) = run_processes(1, train_without_noise, tmp_path / "one")
    first, second = run_processes(2, train_without_noise, tmp_path / "two")
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], alone[0], rtol=1e-5, atol=1e-6)
    assert first[1] == pytest.approx(alone[1], rel=1e-4)
    assert first[2]
    assert second[2]
    assert Ledger(tmp_path / "two" / LEDGER_NAME).steps == 3
    assert (tmp_path / "two" / "checkpoint-2" / LEDGER_NAME).exists()


def test_the_noise_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    first, second = run_processes(2, first_gradient, tmp_path)
    assert torch.equal(first, second)
    six_errors = 6 / (2 * first.numel()) ** 0.5
    assert first.std().item() == pytest.approx(500.0 * 0.5 / 6, rel=six_errors)
    assert six_errors < 2**0.5 - 1, "noise of one process alone, or of both twice, would show"


def test_processes_share_one_secret_draw(tmp_path: Path) -> None:
    first, second = run_processes(2, secret_draws, tmp_path)
    assert first == second
    assert len({tuple(draw) for draw in first}) == 3
    assert run_processes(1, secret_draws, tmp_path)[0] != first


def test_what_the_main_process_refuses_is_refused_on_all(tmp_path: Path) -> None:
    first, second = run_processes(2, refusal, tmp_path)
    assert first == second


def test_torchrun_with_the_flags_of_a_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    flags = (
        f"--output_dir {tmp_path}/run --use_cpu --per_device_train_batch_size 1 --gradient_accumulation_steps 3 "
        "--num_train_epochs 2 --target_epsilon 8 --delta 1e-3 --clip_norm 1.0 --max_grad_norm 0 "
        "--lr_scheduler_type constant --learning_rate 1e-4 --disable_tqdm True --dataloader_num_workers 1 "
        "--remove_unused_columns False --label_names labels --weight_decay 0.01 --report_to none --log_level info"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(tmp_path / "script.py"), *flags.split()],
        env=environment,
        stdout=(tmp_path / "out.txt").open("w"),
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,  # judged by its files, because a CPU process group sometimes aborts at exit
    )
    report = tmp_path / "run" / "publish" / "privacy_report.json"
    assert report.exists(), (tmp_path / "out.txt").read_text()
    statement = json.loads(report.read_text())
    assert (statement["steps"], statement["expected_batch_size"], statement["guarantee"]) == (4, 6, "dp")
    assert 7.5 < statement["epsilon"] <= 8.0
