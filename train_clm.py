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
from accelerate.utils import broadcast_object_list, set_seed

from dptune import CausalLMLoss
from dptune.clipping import layers_of
from dptune.identity import refuse_other_run
from utils.arguments import ModelArguments, exit_on_invalid_argument, parse, public_config
from utils.data import load_training_data
from utils.evaluation import held_out_loss
from utils.folder_lock import FolderLock
from utils.launch import compute_dtype, loss_scale, make_accelerator, memory_settings, sharding_of_launch
from utils.memory import device_memory
from utils.micro_batches import MicroBatches, remembered_budget
from utils.modeling import checkpoint_activations, load_model, load_skeleton, load_tokenizer, require_context
from utils.resume import Checkpoints, find_saved_run, model_identity, processes_of_plan, run_identity
from utils.run_outputs import finish_run, start_run
from utils.run_plan import describe_data, describe_model, describe_plan, num_sampled, plan_run
from utils.sharded_model import describe_shards
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
from utils.training_loop import TrainingLoop, describe_stop

GROUPS = (
    ModelArguments,
    DataArguments,
    PrivacyArguments,
    ClippingArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
)


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
    loop = TrainingLoop(
        accelerator,
        model,
        losses,
        plan,
        ledger,
        micro_batches,
        checkpoints,
        evaluate=partial(evaluate, model, losses, held_out, micro_batches),
        updates=optimization.updates,
        eval_freq=output.eval_freq,
        eval_at_start=output.eval_at_start,
        target_epsilon=privacy_args.target_epsilon,
        test_seed=privacy_args.insecure_test_seed,
        gradient_sync=optimization.gradient_sync,
        loss_scale=loss_scale(dtype),
    )
    end, rows = loop.run(saved, track=accelerator.log)
    accelerator.end_training()
    if end.stopped_by is not None:
        accelerator.print(describe_stop(end, plan.steps, folder))
    elif accelerator.is_main_process:
        facts: dict[str, Any] = {"base_model": name, "tokenizer": tokenizer, "diagnostics": rows}
        finish_run(folder, model, plan, ledger, completed=end.completed, noise=end.noise, **facts)


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
