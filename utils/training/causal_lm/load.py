"""Loads the model of a planned run, with its trained parameters, and checks it before a private step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import set_seed

from dptune._validate import present, refuse
from dptune.losses import CausalLMLoss
from dptune.run.identity import model_identity
from utils.cli.launch import ranks_of, sharding_of_launch
from utils.models.loading import checkpoint_activations, load_model
from utils.models.sharded import describe_shards
from utils.models.trainable import Losses, check_precision, check_rules, in_autocast, prepare_trainable
from utils.training.causal_lm.job import CausalLMJob, with_clip_norm
from utils.training.causal_lm.skeleton import recomputes
from utils.training.causal_lm.task import CausalLMTask
from utils.training.dials import DialLosses, attach_dials
from utils.training.measured_clip_norm import clip_norm_of_own_texts
from utils.training.resume import refuse_other_beginning
from utils.training.views import with_token_dropout


def load_causal_lm(job: CausalLMJob) -> CausalLMTask:
    """The model with its trained parameters, the same on every rank. Checks its gradients before a private run.

    A clip norm that was still open is measured: the task's `job` has it in its flags, plan and settings.

    Raises:
        InvalidArgument: the checkpoint is of another model, or the engine cannot compute the model's gradients.
    """
    groups, accelerator = job.groups, job.folder.accelerator
    set_seed(groups.optimization.seed)  # initial adapters; noise and sampling use secret keys
    model = _load_model(job)
    identity = job.identity | model_identity(model)
    if job.folder.saved is not None and accelerator.is_main_process:
        refuse_other_beginning(job.folder.saved, identity)
    if job.plan.privacy is not None:
        _check_neighbours(job, model)
    if recomputes(groups):
        checkpoint_activations(model)
    losses = in_autocast(CausalLMLoss(model), job.dtype if job.whole else torch.float32, accelerator.device)
    if groups.privacy.clip_norm_is_open:
        job = _with_measured_clip_norm(job, model, losses)
    losses = with_token_dropout(losses, model, job.tokenizer, groups.views.token_dropout, accelerator.device)
    dials = None
    if job.dials is not None and job.plan.privacy is not None:
        dials = attach_dials(model, len(job.dials.included), accelerator.device)
        losses = DialLosses(losses, dials, job.plan.privacy.clip_norm)
    return CausalLMTask(job, model, losses, job.names if job.whole else None, identity, dials=dials)


def _load_model(job: CausalLMJob) -> Any:
    """The model on its device, or this rank's shard of it, with its trained parameters."""
    groups, accelerator, sharding = job.groups, job.folder.accelerator, sharding_of_launch()
    model = load_model(
        groups.model.model_name_or_path,
        **groups.model.hub,
        dtype=torch.float32 if job.whole else job.dtype,
        device=accelerator.device,
        bits=groups.model.qbits,
        sharding=sharding,
        attention=groups.model.attn_implementation,
    )
    prepare_trainable(model, groups.lora)
    if sharding is not None:
        accelerator.print(describe_shards(model, accelerator.num_processes))
    return model


def _with_measured_clip_norm(job: CausalLMJob, model: Any, losses: Losses) -> CausalLMJob:
    """The same job with a measured clip norm, which is the same on every rank. Every rank calls this."""
    accelerator, longest = job.folder.accelerator, job.groups.data.block_size
    measured = clip_norm_of_own_texts(model, losses, job.tokenizer, longest=longest, loss_scale=job.loss_scale)
    clip_norm = ranks_of(accelerator).from_main(lambda: measured)
    accelerator.print(f"clip norm              {clip_norm:g}, measured on texts that the model writes")
    groups = with_clip_norm(job.groups, clip_norm)
    config = present(job.plan.privacy, "mechanism")
    return replace(
        job,
        groups=groups,
        plan=replace(job.plan, privacy=replace(config, clip_norm=clip_norm)),
        config=job.config | {"clip_norm": clip_norm},
    )


def _check_neighbours(job: CausalLMJob, model: Any) -> None:
    """Refuse a model whose per-example gradients come out wrong, or whose rows affect each other.

    Two rows of the full length are tried, whatever the token budget: it may grow when the run resumes.
    """
    losses, scale, width = CausalLMLoss(model), job.loss_scale, job.groups.data.block_size
    device = job.folder.accelerator.device
    try:
        check_rules(model, lambda *rows: losses(*rows) * scale, device, width=width)
        if job.whole and job.dtype == torch.float16:
            lower = in_autocast(losses, job.dtype, device)
            check_precision(model, losses, lower, device, width=width, scale=scale)
    except torch.OutOfMemoryError:
        remedy = "out of memory on two random rows of that length, on which the model is checked once; lower it"
        refuse("block_size", width, remedy)
