"""The run of one task of train_classifier.py: a model that passes its checks, trained and saved."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from dptune._validate import refuse
from dptune.integrations.peft import class_logits
from dptune.run.folder import refuse_existing_run
from dptune.run.identity import num_trained
from dptune.run.plan_lines import describe_noise
from utils.classification.arguments import ON_RESUME
from utils.classification.classifier_task import ClassifierTask, identity_of, known_beginning
from utils.classification.label_words import describe_head, is_decoder
from utils.classification.losses import ClassificationLoss, check_classifier_rules
from utils.classification.measured_defaults import typical_gradient_norm
from utils.classification.model import Trained, describe_rates, load_in_mode
from utils.classification.outputs import finished_results, refuse_other_results
from utils.classification.plan import PlannedTask, shapes_of
from utils.cli.flags import public_config
from utils.cli.launch import compute_dtype, describe_precision, ranks_of, sharding_of_launch
from utils.models.trainable import in_autocast
from utils.training.changes import describe_changes, resumed_config
from utils.training.loop import Pace
from utils.training.micro_batches import MicroBatches, remembered_budget
from utils.training.optimizers import UpdateSettings
from utils.training.resume import OTHER_FILES, refuse_other_beginning
from utils.training.run import open_folder, train
from utils.training.views import with_token_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORT = 0.5  # of a typical gradient norm: at a third of it, full mode predicted only the majority class


def run_task(planned: PlannedTask, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> bool:
    """Train and save one task; returns False if a signal stopped it. A dry run stops before training."""
    task, settings, plan = planned
    output, dtype = settings.results.of_task(settings.folder / task.name), dtype_of_launch(accelerator)
    with open_folder(output, accelerator) as folder:
        if folder.saved is not None:
            refuse_other_beginning(folder.saved, known_beginning(planned))
        launch = {"task": task.name, "num_processes": accelerator.num_processes}
        delta = {} if plan.privacy is None else {"delta": plan.privacy.delta}
        config = resumed_config(public_config(*settings) | launch | delta, folder.saved, ON_RESUME)
        for line in [*describe_changes(config, folder.saved), *describe_precision(dtype, accelerator.device)]:
            accelerator.print(line)
        trained = load_trained(planned, tokenizer, accelerator)
        if output.dry_run:
            return True
        fine_tuning = _fine_tuning(planned, trained, tokenizer, dtype, accelerator)
        budget = ranks_of(accelerator).from_main(lambda: remembered_budget(folder.path, settings.token_budget))
        micro_batches = MicroBatches(
            task.train,
            shapes_of(settings, plan, accelerator, budget),
            tokenizer.pad_token_id,
            accelerator,
            virtual_tokens=settings.virtual_tokens,
        )
        pace = _pace(planned, trained.updates)
        end = train(fine_tuning, plan, folder, micro_batches, pace, config, public_config(*settings))
        return end.stopped_by is None


def _fine_tuning(
    planned: PlannedTask,
    trained: Trained,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    accelerator: Accelerator,
) -> ClassifierTask:
    """The task for the training loop, with losses and logits in the launch's precision."""
    model, device = trained.model, accelerator.device
    losses = in_autocast(ClassificationLoss(model), dtype, device)
    losses = with_token_dropout(losses, model, tokenizer, planned.settings.views.token_dropout, device)
    logits = in_autocast(partial(class_logits, model), dtype, device)
    return ClassifierTask(planned, trained, tokenizer, losses, logits)


def _pace(planned: PlannedTask, updates: UpdateSettings) -> Pace:
    """How parameters are updated, and how often they are evaluated: once per epoch unless --eval_freq is given."""
    settings, epoch = planned.settings, max(1, round(1 / planned.plan.sampling_probability))
    return Pace(
        updates,
        settings.results.eval_freq or epoch,
        plain_max_grad_norm=settings.budget.plain_max_grad_norm,
        selection=settings.results.of_task(settings.folder).selection,
        averaging=settings.steps.averaging,
    )


def is_finished(planned: PlannedTask, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> bool:
    """Whether an earlier launch finished this task with these settings. Every rank calls it.

    Raises:
        InvalidArgument: the folder holds a run and resuming was not asked for, or a run with other settings.
    """
    folder, output, ranks = planned.settings.folder / planned.task.name, planned.settings.results, ranks_of(accelerator)
    if output.dry_run:
        return False
    if output.resume_from_checkpoint is None:
        ranks.from_main(lambda: refuse_existing_run(folder, OTHER_FILES))
    if (found := ranks.from_main(lambda: finished_results(folder))) is None:
        return False
    trained = load_in_mode(planned.task, planned.settings, tokenizer, planned.plan.privacy)
    refuse_other_results(found, identity_of(planned, trained))
    return True


def load_trained(planned: PlannedTask, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Trained:
    """A fresh model in its mode on this rank's device, the same on every rank; a private one passes a gradient check.

    Raises:
        InvalidArgument: no such model, a mode that does not fit it, a --block_size beyond its context, or layers that
            the engine does not support.
    """
    task, settings, plan = planned
    trained = load_in_mode(task, settings, tokenizer, plan.privacy)
    model = trained.model
    every = sum(parameter.numel() for parameter in model.parameters())
    some = num_trained(model)
    accelerator.print(f"trainable parameters   {some:,} of {every:,} ({some / every:.3%})")
    if (words := settings.head.label_words) is not None:
        accelerator.print(describe_head(words, task.class_names, decoder=is_decoder(model)))
    accelerator.print(describe_rates(trained.updates, chosen=settings.steps.learning_rate is not None))
    model.to(accelerator.device).eval()
    if plan.privacy is not None:
        kinds = {"num_classes": len(task.class_names), "pad_token_id": tokenizer.pad_token_id}
        short = describe_short_clip_norm(plan.privacy.clip_norm, typical_gradient_norm(model))
        for line in [*describe_noise(plan, some), *short]:
            accelerator.print(line)
        longest, types = settings.checkpoint.block_size, task.train.token_types is not None
        check_classifier_rules(model, token_types=types, max_length=longest, **kinds)
    return trained


def describe_short_clip_norm(clip_norm: float, typical: float) -> list[str]:
    """A warning if the clip norm is too small to learn much: see `measured_defaults.measure_clip_norm`."""
    if not clip_norm < _SHORT * typical:
        return []
    return [
        f"warning: clip norm {clip_norm:g} is far below the typical gradient norm at the start, {typical:.2g}. Nearly "
        "every gradient is clipped, so the model may predict only the majority class; leave --clip_norm out"
    ]


def dtype_of_launch(accelerator: Accelerator) -> torch.dtype:
    """The dtype of forward passes.

    Raises:
        InvalidArgument: the launch shards the model, or uses float16.
    """
    if sharding_of_launch() is not None:
        refuse("distributed_type", "FSDP", "classifiers are not sharded; use accelerate_config_nofsdp.cfg or torchrun")
    dtype = compute_dtype(accelerator.mixed_precision, accelerator.device)
    if dtype == torch.float16:
        refuse("mixed_precision", "fp16", "classifiers do not scale their losses for float16; set it to bf16 or no")
    return dtype
