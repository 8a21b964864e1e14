"""Runs a planned job: loads its model and trains it, in micro-batches that fit in memory."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object

from dptune.devices import computes_apart
from dptune.lora import trainable_parameters
from dptune.pass_overhead import pass_overhead
from dptune.shapes import Shapes
from dptune.sharding import are_sharded, is_sharded
from utils.cli.flags import public_config
from utils.cli.launch import sharding_of_launch
from utils.models.memory import device_memory, keeps_whole_sum
from utils.training.canaries import begin
from utils.training.causal_lm.job import CausalLMJob
from utils.training.causal_lm.load import load_causal_lm
from utils.training.causal_lm.task import CausalLMTask
from utils.training.dials import DialScores
from utils.training.in_step import Gathers
from utils.training.loop import AfterStep, End, Pace
from utils.training.micro_batches import MicroBatches
from utils.training.rehearsal import Rehearsal, is_worthwhile
from utils.training.run import train


def run_job(job: CausalLMJob, after_step: AfterStep | None = None) -> End:
    """Load the model and train it. For `after_step` see `utils.training.loop.Pace`."""
    task = load_causal_lm(job)
    job = task.job
    _begin_audit(task)
    whole_sum = _keeps_whole_sum(job, task.model)
    micro_batches = _micro_batches(task, whole_sum)
    pace = _pace(task, whole_sum, after_step)
    return train(task, job.plan, job.folder, micro_batches, pace, job.config, public_config(*job.groups))


def _begin_audit(task: CausalLMTask) -> None:
    """Write the canaries of an audit, if there are any, before the first step."""
    job, accelerator = task.job, task.job.folder.accelerator
    if not accelerator.is_main_process:
        return
    if job.canaries is not None or job.dials is not None:
        job.folder.lock.make(job.folder.path)
    if job.canaries is not None:
        begin(job.folder.path, job.canaries, task.model, task.losses, accelerator.device)


def _micro_batches(task: CausalLMTask, whole_sum: bool) -> MicroBatches:
    """The rows of each draw, in micro-batches."""
    job = task.job
    gathers = None if sharding_of_launch() is None else Gathers(task.model, private=job.plan.privacy is not None)
    return MicroBatches(
        job.train,
        _shapes(task, gathers, whole_sum),
        job.tokenizer.pad_token_id,
        job.folder.accelerator,
        in_step=gathers is not None,
        gathers=gathers,
        folder=job.folder.path,
        asked=job.asked,
    )


def _pace(task: CausalLMTask, whole_sum: bool, after_step: AfterStep | None) -> Pace:
    """How the run trains and evaluates."""
    job = task.job
    optimization, output = job.groups.optimization, job.groups.output
    return Pace(
        optimization.updates,
        output.eval_freq,
        eval_at_start=output.eval_at_start,
        gradient_sync=optimization.sync,
        loss_scale=job.loss_scale,
        keep_whole_sum=whole_sum,
        plain_max_grad_norm=None if job.plan.privacy is not None else optimization.max_grad_norm or None,
        selection=output.selection,
        averaging=optimization.averaging,
        after_step=after_step,
        after_release=_dial_scores(task),
    )


def _dial_scores(task: CausalLMTask) -> DialScores | None:
    """What scores the dials after each release, with their coins in the run's folder; None without dials."""
    job = task.job
    accelerator, config = job.folder.accelerator, job.plan.privacy
    if job.dials is None or task.dials is None or config is None:
        return None
    scores = DialScores(job.folder.path, job.dials, task.dials, config, is_main=accelerator.is_main_process)
    scores.begin()
    return scores


def _shapes(task: CausalLMTask, gathers: Gathers | None, whole_sum: bool) -> Shapes:
    """The shapes of micro-batches, which fit in memory as far as a rehearsal can tell."""
    job, accelerator = task.job, task.job.folder.accelerator
    shapes = Shapes(
        job.groups.data.block_size,
        job.token_budget,
        job.plan.expected_batch_size / accelerator.num_processes,
        masked=False,  # causal attention needs no mask for padding on the right
        overhead=pass_overhead(accelerator=computes_apart(accelerator.device), sharded=is_sharded(task.model)),
        views=job.groups.views.views,
    )
    if not is_worthwhile(accelerator.device, gathers):
        return shapes
    rehearsal = Rehearsal(
        task.model,
        task.losses,
        job.plan,
        accelerator,
        rows_per_item=job.groups.privacy.unit.rows_at_once,
        loss_scale=job.loss_scale,
        gathers=gathers,
        keep_whole_sum=whole_sum,
        keeps_average=job.groups.optimization.averaging.is_on,
    )
    return rehearsal.settle(shapes)


def _keeps_whole_sum(job: CausalLMJob, model: Any) -> bool:
    """Whether every rank has room for a whole sum, if the trained weights are sharded. Every rank calls this."""
    parameters = trainable_parameters(model)
    if not are_sharded(parameters):
        return False
    trained = sum(parameter.numel() for parameter in parameters)
    return all(gather_object([keeps_whole_sum(trained, device_memory(job.folder.accelerator.device))]))
