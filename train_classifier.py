r"""Fine-tune a sentence classifier, privately or not, in one of nine ways (`--finetune_mode`).

    python train_classifier.py --datasets sst2 --finetune_mode full
    python train_classifier.py --datasets qnli qqp --finetune_mode ia3 \
        --enable_dp --target_epsilon 8.0 --max_grad_norm 0.1

Or behind torchrun or accelerate launch, on several processes. Each task gets a folder, a model and a privacy budget of
its own. `--dry_run` prints what a run would cost and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dptune.integrations.peft import class_logits
from dptune.run.identity import refuse_other_run
from utils.classification.arguments import GROUPS, Settings
from utils.classification.files import load_classifier_tokenizer
from utils.classification.losses import ClassificationLoss, predict
from utils.classification.metrics import scores
from utils.classification.modes import head_parameters
from utils.classification.outputs import finish_classifier, finished_results, refuse_other_results
from utils.classification.setup import (
    describe_setup,
    dtype_of_launch,
    load_in_mode,
    load_tasks,
    load_trained,
    plan_task,
    run_identity_of,
)
from utils.classification.tasks import ClassificationTask, describe_task
from utils.cli.flags import exit_on_invalid_argument, parse, public_config
from utils.cli.folder_lock import FolderLock
from utils.cli.launch import make_accelerator
from utils.models.trainable import in_autocast
from utils.training.loop import TrainingLoop, describe_stop
from utils.training.micro_batches import MicroBatches, remembered_budget
from utils.training.outputs import refuse_existing_run, start_run
from utils.training.plan import RunPlan, describe_plan
from utils.training.resume import Checkpoints, find_saved_run, model_identity


@exit_on_invalid_argument()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train on one task after another."""
    settings = Settings(*parse(*GROUPS, args=argv, description=__doc__))
    accelerator = make_accelerator()
    run_tasks(settings, accelerator)
    accelerator.end_training()


def run_tasks(settings: Settings, accelerator: Accelerator) -> None:
    """Load and plan all tasks, so that a mistake in the last one is found before the first is trained; then train."""
    dtype = dtype_of_launch(accelerator)
    tokenizer = load_classifier_tokenizer(settings.checkpoint.model_checkpoint)
    planned = [plan_task(task, settings, tokenizer, accelerator) for task in load_tasks(settings, tokenizer)]
    finished = set()
    for task, settled, plan in planned:
        if settings.results.resume_from_checkpoint is None and accelerator.is_main_process:
            refuse_existing_run(str(settings.folder / task.name))
        if (found := broadcast_object_list([finished_results(settings.folder / task.name)])[0]) is not None:
            updates = load_in_mode(task, settled, tokenizer).identity(plan, settled)
            refuse_other_results(found, {"run": run_identity_of(task, plan, settled), "updates": updates})
            finished.add(task.name)
        accelerator.print(*describe_task(task), *describe_plan(plan), *describe_setup(settings), sep="\n")
    for task, settled, plan in planned:
        folder = settings.folder / task.name
        if settings.results.dry_run:
            load_trained(task, plan, settled, tokenizer, accelerator)
        elif task.name in finished:
            accelerator.print(f"finished already       {folder}")
        else:
            with FolderLock(enabled=accelerator.is_main_process) as lock:
                if not train_task(task, plan, settled, tokenizer, accelerator, dtype, lock):
                    return


def train_task(
    task: ClassificationTask,
    plan: RunPlan,
    settings: Settings,
    tokenizer: Any,
    accelerator: Accelerator,
    dtype: torch.dtype,
    lock: FolderLock,
) -> bool:
    """Train and write one task; whether it ended by itself."""
    folder, output = settings.folder / task.name, settings.results.of_task(settings.folder / task.name)
    lock.take(folder)
    saved = find_saved_run(output, accelerator)
    identity = {"run": run_identity_of(task, plan, settings)}
    if saved is not None:
        refuse_other_run(saved.identity["run"], identity["run"])
    trained = load_trained(task, plan, settings, tokenizer, accelerator)
    model, names, updates, _ = trained
    identity |= {"updates": trained.identity(plan, settings), "model": model_identity(model)}
    if saved is not None and accelerator.is_main_process:
        for part in ("updates", "model"):  # earlier checkpoints have no updates
            refuse_other_run(saved.identity.get(part, identity[part]), identity[part])
    config = public_config(*settings) | {"task": task.name, "num_processes": accelerator.num_processes}
    ledger = start_run(folder, config, private=plan.privacy is not None, is_main=accelerator.is_main_process)
    lock.take(folder)
    token_budget = broadcast_object_list([remembered_budget(folder, settings.token_budget)])[0]
    how: dict[str, Any] = {"virtual_tokens": settings.virtual_tokens, "length_flag": "--max_length"}
    micro_batches = MicroBatches(task.train, token_budget, tokenizer.pad_token_id, accelerator, **how)
    kept: dict[str, Any] = {"every": output.checkpointing_steps, "keep": output.save_total_limit, "trained": names}
    checkpoints = Checkpoints(folder, ledger, identity, config, accelerator=accelerator, **kept)
    classify = in_autocast(partial(class_logits, model), dtype, accelerator.device)
    loop = TrainingLoop(
        accelerator,
        model,
        in_autocast(ClassificationLoss(model), dtype, accelerator.device),
        plan,
        ledger,
        micro_batches,
        checkpoints,
        evaluate=partial(evaluate, model, classify, task, micro_batches),
        updates=updates,
        eval_freq=settings.results.eval_freq or max(1, round(1 / plan.sampling_probability)),
        target_epsilon=settings.budget.engine.target_epsilon,
        test_seed=settings.budget.insecure_test_seed,
        plain_max_grad_norm=settings.budget.plain_max_grad_norm,
        head=head_parameters(model, names),
    )
    end, rows = loop.run(saved)
    if end.stopped_by is not None:
        accelerator.print(describe_stop(end, plan.steps, folder))
    elif accelerator.is_main_process:
        facts: dict[str, Any] = {"completed": end.completed, "noise": end.noise, "diagnostics": rows}
        finish_classifier(folder, model, tokenizer, task, plan, settings, identity, ledger, **facts)
    accelerator.wait_for_everyone()
    return end.stopped_by is None


def evaluate(
    model: Any,
    classify: Callable[[Mapping[str, Tensor]], Tensor],
    task: ClassificationTask,
    micro_batches: MicroBatches,
) -> dict[str, Any]:
    """Loss and scores on the validation splits, if there are any, of a model that goes on training."""
    found, total, rows = {}, 0.0, 0
    accelerator = micro_batches.accelerator
    model.eval()
    for split, data in task.validation.items():
        classes, loss = predict(
            classify,
            data,
            token_budget=micro_batches.token_budget,
            pad_token_id=micro_batches.pad_token_id,
            device=accelerator.device,
            gather=accelerator.gather,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            virtual_tokens=micro_batches.virtual_tokens,
        )
        found[split] = scores(data.labels, classes, task.metrics)
        total, rows = total + loss * len(data), rows + len(data)
    model.train()
    return {"eval_loss": total / rows, "scores": found} if rows else {}


if __name__ == "__main__":
    main()
