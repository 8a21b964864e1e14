r"""Fine-tune a causal language model under differential privacy: LoRA adapters, or with --trainable the model itself.

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg train_clm.py \
        --train_file my.json --model_name_or_path PATH --output_dir OUT --block_size 512 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 512 --num_train_epochs 5 \
        --clip_norm 1 --target_epsilon 8 --learning_rate 3e-4

`--clip_norm -1 --noise_multiplier -1` trains without privacy; `--dry_run` prints what a run would cost and stops.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from transformers import get_scheduler

from dptune import CausalLMLoss, GaussianNoise, Ledger, trainable_parameters
from dptune.checkpoint import TrainingState
from dptune.clipping import layers_of
from dptune.dropout import draw_new_masks
from dptune.identity import refuse_other_run
from dptune.ranks import require_equal
from utils.arguments import ModelArguments, exit_on_invalid_argument, parse, public_config
from utils.data import load_training_data
from utils.evaluation import held_out_loss
from utils.folder_lock import FolderLock
from utils.interruption import StopRequest
from utils.launch import compute_dtype, loss_scale, make_accelerator, memory_settings, sharding_of_launch
from utils.memory import device_memory
from utils.micro_batches import MicroBatches, remembered_budget
from utils.modeling import checkpoint_activations, load_model, load_skeleton, load_tokenizer, require_context
from utils.optimizers import make_optimizer
from utils.randomness import make_sampler
from utils.resume import (
    Checkpoints,
    find_saved_run,
    last_step,
    model_identity,
    processes_of_plan,
    restore,
    run_identity,
)
from utils.run_log import RunLog, StepMetrics
from utils.run_outputs import finish_run, start_run
from utils.run_plan import RunPlan, describe_data, describe_model, describe_plan, num_sampled, plan_run
from utils.sharded_model import describe_shards
from utils.steps import make_step, measured, running_epsilon
from utils.tokenization import TokenizedDataset
from utils.trackers import start_trackers
from utils.trainable import Losses, check_rules, in_autocast, prepare_trainable
from utils.training_arguments import (
    ClippingArguments,
    DataArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
    PrivacyArguments,
)

GROUPS = (
    ModelArguments,
    DataArguments,
    PrivacyArguments,
    ClippingArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
)
_RANKS_CHECKED_EVERY = 10  # steps


@exit_on_invalid_argument()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train, alone in the output folder."""
    groups = parse(*GROUPS, args=argv, description=__doc__)
    accelerator = make_accelerator()
    with FolderLock(enabled=accelerator.is_main_process) as lock:
        run_training(groups, accelerator, lock)


def run_training(groups: tuple[Any, ...], accelerator: Accelerator, lock: FolderLock) -> None:
    """Plan, load, train, write."""
    model_args, data_args, privacy_args, clipping_args, lora_args, optimization, output = groups
    sharding, folder = sharding_of_launch(), Path(output.output_dir)
    lock.take(folder)
    saved = find_saved_run(output, accelerator)
    dtype = compute_dtype(accelerator.mixed_precision, accelerator.device)
    name, hub = model_args.model_name_or_path, {"token": model_args.access_token, "revision": model_args.revision}
    recompute = optimization.gradient_ckpt or (sharding is not None and sharding.checkpoint_activations)

    skeleton = load_skeleton(name, **hub)
    require_context(skeleton, data_args.block_size)
    # A wrong target is found here, before gigabytes are read.
    names = prepare_trainable(skeleton, lora_args, sharded=sharding is not None, bits=model_args.qbits, dtype=dtype)
    tokenizer = load_tokenizer(name, **hub)
    unit = privacy_args.unit
    train, held_out = load_training_data(tokenizer=tokenizer, unit=unit, seed=optimization.seed, **vars(data_args))
    processes = processes_of_plan(saved, optimization, accelerator.num_processes)
    clipping = clipping_args.style(layers_of(names).values())
    plan = plan_run(
        privacy_args, optimization, num_examples=num_sampled(unit, train), world_size=processes, clipping=clipping
    )
    identity = {"run": run_identity(plan, train, privacy_args, optimization.optimizer)}
    if saved is not None:
        refuse_other_run(saved.identity["run"], identity["run"])
    asked = optimization.max_tokens_per_device or optimization.per_device_train_batch_size * data_args.block_size
    token_budget = broadcast_object_list([remembered_budget(folder, asked)])[0]
    accelerator.print(*describe_plan(plan), *describe_data(train, held_out), sep="\n")
    memory = memory_settings(sharding, accelerator.num_processes, model_args.qbits)
    limits = {"block_size": data_args.block_size, "lengths": train.lengths, "checkpointing": recompute}
    available = device_memory(accelerator.device)
    at_once = max(token_budget, unit.rows_at_once * data_args.block_size)
    accelerator.print(*describe_model(skeleton, at_once, dtype, available=available, **limits, **memory), sep="\n")
    if output.dry_run:
        return

    set_seed(optimization.seed)  # the adapters' start; noise and sampling are keyed from the operating system
    held = torch.float32 if lora_args.trainable else dtype
    model = load_model(name, **hub, dtype=held, device=accelerator.device, bits=model_args.qbits, sharding=sharding)
    prepare_trainable(model, lora_args)
    if sharding is not None:
        accelerator.print(describe_shards(model, accelerator.num_processes))
    identity["model"] = model_identity(model)
    if saved is not None and accelerator.is_main_process:
        refuse_other_run(saved.identity["model"], identity["model"])
    if lora_args.trainable and plan.privacy is not None:
        check_rules(model, CausalLMLoss(model), accelerator.device)
    if recompute:
        checkpoint_activations(model)

    config = public_config(*groups) | {"num_processes": processes}
    group_size, is_main = unit.group_size, accelerator.is_main_process
    ledger = start_run(folder, config, private=plan.privacy is not None, is_main=is_main, group_size=group_size)
    lock.take(folder)
    start_trackers(accelerator, output.report_to, "dptune", config, logging_dir=folder / "tracking")
    every, keep = output.checkpointing_steps, output.save_total_limit
    trained = names if lora_args.trainable else None
    checkpoints = Checkpoints(
        folder, ledger, identity, config, every=every, keep=keep, accelerator=accelerator, trained=trained
    )
    losses = in_autocast(CausalLMLoss(model), dtype if lora_args.trainable else torch.float32, accelerator.device)
    pad, in_step = tokenizer.pad_token_id, sharding is not None
    micro_batches = MicroBatches(train, token_budget, pad, accelerator, in_step=in_step, folder=folder)
    scale = loss_scale(dtype)
    run = Run(accelerator, model, losses, plan, privacy_args, ledger, micro_batches, held_out, checkpoints, scale)
    start = saved.step if saved else 0
    last = broadcast_object_list([last_step(plan, ledger, privacy_args.target_epsilon, start)])[0]
    with RunLog(
        folder, plan.steps, start_step=start, is_main=accelerator.is_main_process, track=accelerator.log
    ) as log:
        end = run.steps(log, optimization, saved, last=last, eval_freq=output.eval_freq)
    accelerator.end_training()
    if end.stopped_by is not None:
        accelerator.print(
            f"{end.stopped_by}: stopped after step {end.completed} of {plan.steps}, saved in {folder}; "
            "go on with --resume_from_checkpoint latest"
        )
    elif accelerator.is_main_process:
        facts: dict[str, Any] = {"base_model": name, "tokenizer": tokenizer, "diagnostics": log.rows}
        finish_run(folder, model, plan, ledger, completed=end.completed, noise=end.noise, **facts)


@dataclass(frozen=True)
class End:
    """How training ended: after which step, by which signal (None: by itself), and where its noise came from."""

    completed: int
    stopped_by: str | None
    noise: GaussianNoise | None


@dataclass
class Run:
    """One training run on this process."""

    accelerator: Accelerator
    model: Any
    losses: Losses
    plan: RunPlan
    privacy: PrivacyArguments
    ledger: Ledger | None  # on the main process of a private run
    micro_batches: MicroBatches
    held_out: TokenizedDataset | None
    checkpoints: Checkpoints
    loss_scale: float

    def steps(
        self, log: RunLog, settings: OptimizationArguments, saved: TrainingState | None, *, last: int, eval_freq: int
    ) -> End:
        """Train from what was saved until after step `last`, or until asked to stop."""
        parameters = trainable_parameters(self.model)
        seed = self.privacy.insecure_test_seed
        own_step = make_step(
            self.model,
            self.plan,
            self.ledger,
            self.accelerator,
            gradient_sync=settings.gradient_sync,
            loss_scale=self.loss_scale,
            test_seed=seed,
            completed=saved.step if saved else 0,
        )
        optimizer = make_optimizer(
            settings.optimizer,
            parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            noise_std=own_step.gradient_noise_std,
        )
        schedule = get_scheduler(
            settings.lr_scheduler_type, optimizer, settings.num_warmup_steps, num_training_steps=self.plan.steps
        )
        completed = restore(saved, self.model, optimizer, schedule, own_step)
        self.model.train()  # transformers recomputes activations in training mode only
        authors = self.micro_batches.data.authors
        sampler = make_sampler(self.plan, self.accelerator, authors, test_seed=seed, completed=completed)
        with own_step as step, StopRequest(announce=self.accelerator.is_main_process) as stop:
            save = partial(self.checkpoints.save, model=self.model, optimizer=optimizer, schedule=schedule, step=step)
            if completed == 0:
                log.record(StepMetrics(step=0, eval_loss=self._evaluate()))
                if self.checkpoints.every:
                    save(0)
            for number in range(completed + 1, last + 1):
                began = time.perf_counter()
                if number % _RANKS_CHECKED_EVERY == 1:
                    require_equal(parameters, self.accelerator.gather)
                draw = sampler.draw()
                draw_new_masks(self.accelerator.process_index, number, test_seed=seed)
                seen = self.micro_batches.run(draw, step, self.losses, stop)
                if seen is None:
                    save(completed)
                    break
                step.finish()
                learning_rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                completed = number
                evaluate = completed % eval_freq == 0 or completed == last
                seconds = time.perf_counter() - began
                log.record(
                    StepMetrics(
                        step=completed,
                        seconds=seconds,
                        learning_rate=learning_rate,
                        epsilon=running_epsilon(self.plan, self.ledger),
                        eval_loss=self._evaluate() if evaluate else None,
                        **measured(self.micro_batches, self.plan, draw, seen),
                    )
                )
                if self.checkpoints.due(completed, last):
                    save(completed)
            stopped_by = (stop.name or "a signal") if completed < last else None
            return End(completed, stopped_by, step.noise)

    def _evaluate(self) -> float | None:
        if self.held_out is None:
            return None
        self.model.eval()
        loss = held_out_loss(
            self.losses,
            self.held_out,
            token_budget=self.micro_batches.token_budget,
            pad_token_id=self.micro_batches.pad_token_id,
            device=self.accelerator.device,
            gather=self.accelerator.gather,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.model.train()
        return loss


if __name__ == "__main__":
    main()
