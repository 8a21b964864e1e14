r"""Fine-tune a causal language model under differential privacy: LoRA adapters, or with --trainable the model itself.

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg train_clm.py \
        --train_file my.json --model_name_or_path PATH --output_dir OUT --block_size 512 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 512 --num_train_epochs 5 \
        --clip_norm 1 --target_epsilon 8 --learning_rate 3e-4

`--clip_norm -1 --noise_multiplier -1` trains without privacy; `--dry_run` prints what a run would cost and stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dptune import CausalLMLoss, Ledger
from utils.cli.flags import exit_on_invalid_argument, parse, public_config
from utils.cli.folder_lock import FolderLock
from utils.cli.launch import loss_scale, make_accelerator, sharding_of_launch
from utils.cli.trackers import start_trackers
from utils.data.tokenization import TokenizedDataset
from utils.models.trainable import Losses, in_autocast
from utils.training.evaluation import held_out_loss
from utils.training.loop import TrainingLoop, describe_stop
from utils.training.micro_batches import MicroBatches
from utils.training.outputs import finish_run, start_run
from utils.training.resume import Checkpoints
from utils.training.setup import GROUPS, Groups, Job, load_trained, plan_job


@exit_on_invalid_argument()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train, alone in the output folder."""
    groups = Groups(*parse(*GROUPS, args=argv, description=__doc__))
    accelerator = make_accelerator()
    with FolderLock(enabled=accelerator.is_main_process) as lock:
        run_training(groups, accelerator, lock)


def run_training(groups: Groups, accelerator: Accelerator, lock: FolderLock) -> None:
    """Plan, load, train, write."""
    folder = Path(groups.output.output_dir)
    lock.take(folder)
    job = plan_job(groups, accelerator)
    if groups.output.dry_run:
        return
    model = load_trained(job)
    config = public_config(*groups) | {"num_processes": job.processes}
    started = {"private": job.plan.privacy is not None, "is_main": accelerator.is_main_process}
    ledger = start_run(folder, config, group_size=groups.privacy.unit.group_size, **started)
    lock.take(folder)
    start_trackers(accelerator, groups.output.trackers, "dptune", config, logging_dir=folder / "tracking")
    end, rows = training_loop(job, model, ledger, config).run(job.saved, track=accelerator.log)
    accelerator.end_training()
    if end.stopped_by is not None:
        accelerator.print(describe_stop(end, job.plan.steps, folder))
    elif accelerator.is_main_process:
        facts: dict[str, Any] = {"base_model": groups.model.model_name_or_path, "tokenizer": job.tokenizer}
        facts |= {"completed": end.completed, "noise": end.noise, "diagnostics": rows}
        finish_run(folder, model, job.plan, ledger, **facts)


def training_loop(job: Job, model: Any, ledger: Ledger | None, config: dict[str, Any]) -> TrainingLoop:
    """The steps of a job, ready to run."""
    groups, accelerator, folder = job.groups, job.accelerator, Path(job.groups.output.output_dir)
    output, whole = groups.output, bool(groups.lora.trainable)
    kept: dict[str, Any] = {"every": output.checkpointing_steps, "keep": output.save_total_limit}
    checkpoints = Checkpoints(
        folder, ledger, job.identity, config, accelerator=accelerator, trained=job.names if whole else None, **kept
    )
    losses = in_autocast(CausalLMLoss(model), job.dtype if whole else torch.float32, accelerator.device)
    pad, in_step = job.tokenizer.pad_token_id, sharding_of_launch() is not None
    micro_batches = MicroBatches(job.train, job.token_budget, pad, accelerator, in_step=in_step, folder=folder)
    return TrainingLoop(
        accelerator,
        model,
        losses,
        job.plan,
        ledger,
        micro_batches,
        checkpoints,
        evaluate=partial(evaluate, model, losses, job.held_out, micro_batches),
        updates=groups.optimization.updates,
        eval_freq=output.eval_freq,
        eval_at_start=output.eval_at_start,
        target_epsilon=groups.privacy.target_epsilon,
        test_seed=groups.privacy.insecure_test_seed,
        gradient_sync=groups.optimization.gradient_sync,
        loss_scale=loss_scale(job.dtype),
    )


def evaluate(
    model: Any, losses: Losses, held_out: TokenizedDataset | None, micro_batches: MicroBatches
) -> dict[str, Any]:
    """The held-out loss, if there are held-out data, of a model that goes on training."""
    if held_out is None:
        return {}
    accelerator = micro_batches.accelerator
    model.eval()
    loss = held_out_loss(
        losses,
        held_out,
        token_budget=micro_batches.token_budget,
        pad_token_id=micro_batches.pad_token_id,
        device=accelerator.device,
        gather=accelerator.gather,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    model.train()
    return {"eval_loss": loss}


if __name__ == "__main__":
    main()
