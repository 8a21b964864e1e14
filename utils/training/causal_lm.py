"""Turns the flags of train_clm.py into a trained language model: data, plan, model, evaluation, saved files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, set_seed

from dptune._validate import present, refuse
from dptune.adapter_files import save_adapter
from dptune.audit.training import AUDIT_FOLDER, Canaries
from dptune.averaging import describe_averaging
from dptune.clipping import layers_of
from dptune.devices import computes_apart
from dptune.integrations.sharded_saving import write_sharded
from dptune.lora import trainable_parameters
from dptune.losses import CausalLMLoss
from dptune.pass_overhead import pass_overhead
from dptune.published import CANARIES_SETTING
from dptune.report.card import LORA_ADAPTER, WHOLE_MODEL, Artifact, published_name
from dptune.report.fields import CardFields
from dptune.report.prior import PriorRelease
from dptune.report.recipe import command_line
from dptune.run.identity import mechanism_identity, model_identity, num_trained
from dptune.run.lock import LOCK_NAME
from dptune.run.plan import RunPlan
from dptune.run.plan_lines import describe_needed_data, describe_noise, describe_register
from dptune.shapes import Shapes
from dptune.sharding import are_sharded, is_sharded
from utils.cli.flags import public_config
from utils.cli.launch import loss_scale, ranks_of, sharding_of_launch
from utils.cli.machines import machine_of
from utils.data.load import load_training_data
from utils.data.prompts import PROMPT_STYLE_OF_ROWS
from utils.data.records import roles_of
from utils.data.sources import FileRows, numbered
from utils.data.template_date import TEMPLATE_DATE, tells_date, today
from utils.data.tokenization import TokenizedDataset
from utils.files.folders import missing_folders, remove_empty
from utils.files.shards import find_files, in_words
from utils.models.embeddings import require_embeddings
from utils.models.loading import (
    checkpoint_activations,
    is_configuration,
    load_model,
    load_skeleton,
    load_tokenizer,
    require_context,
)
from utils.models.memory import MemorySettings, device_memory, keeps_whole_sum
from utils.models.sharded import describe_shards
from utils.models.trainable import (
    Losses,
    check_precision,
    check_rules,
    in_autocast,
    prepare_trainable,
    save_trained_model,
)
from utils.training.arguments import OF_ADAPTER, ON_RESUME, Groups
from utils.training.canaries import begin, canaries_of_run, finish, with_canaries
from utils.training.changes import OnResume, describe_changes, resumed_config
from utils.training.data_arguments import DataArguments
from utils.training.dials import (
    DialLosses,
    DialScores,
    attach_dials,
    detach_dials,
    dials_of_run,
    require_worst_case,
    with_dials,
)
from utils.training.evaluation import held_out_loss
from utils.training.in_step import Gathers
from utils.training.initial_adapter import describe_start, initial_releases, start_identity
from utils.training.loop import AfterStep, End, Pace
from utils.training.measured_clip_norm import clip_norm_of_own_texts
from utils.training.micro_batches import MicroBatches, remembered_budget
from utils.training.optimizers import require_works
from utils.training.plan import (
    describe_clipping,
    describe_data,
    describe_model,
    describe_most_passes,
    describe_run,
    num_sampled,
    plan_run,
)
from utils.training.rehearsal import Rehearsal, is_worthwhile
from utils.training.resume import processes_of_plan, refuse_other_beginning
from utils.training.run import RunFolder, train
from utils.training.target import Target, target_of
from utils.training.task import PER_TOKEN, Finished
from utils.training.views import require_different_views, with_token_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings that the model card states, even at their defaults.
_ALWAYS_TOLD = (
    "block_size",
    "clip_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "learning_rate",
    "lr_scheduler_type",
)


@dataclass(frozen=True)
class CausalLMJob:
    """A run of train_clm.py that is planned but has not started.

    Attributes:
        groups: the flags.
        folder: where it runs.
        dtype: what forward passes compute in.
        names: names of all parameters that will be trained.
        tokenizer, train, held_out: the tokenizer and the data.
        plan: sampling, noise and steps.
        config: the settings to record, with the history of their changes.
        identity: what a resumed run must share, as far as it is known before the model is loaded.
        token_budget: padded tokens in one forward pass.
        asked: the token budget that the flags ask for.
        starts_from: the release that the adapters start from, and those before it.
        canaries, dials: rows for an audit, which `train` holds; None without.
    """

    groups: Groups
    folder: RunFolder
    dtype: torch.dtype
    names: list[str]
    tokenizer: PreTrainedTokenizerBase
    train: TokenizedDataset
    held_out: TokenizedDataset | None
    plan: RunPlan
    config: dict[str, Any]
    identity: dict[str, Any]
    token_budget: int
    asked: int
    starts_from: tuple[PriorRelease, ...] = ()
    canaries: Canaries | None = None
    dials: Canaries | None = None

    def run(self, after_step: AfterStep | None = None) -> End:
        """Load the model and train it. For `after_step` see `utils.training.loop.Pace`."""
        task = self.load()
        return task.job._train(task, after_step)

    def _train(self, task: CausalLMTask, after_step: AfterStep | None) -> End:
        groups, accelerator = self.groups, self.folder.accelerator
        if (self.canaries is not None or self.dials is not None) and accelerator.is_main_process:
            self.folder.lock.make(self.folder.path)
        if self.canaries is not None and accelerator.is_main_process:
            begin(self.folder.path, self.canaries, task.model, task.losses, accelerator.device)
        private, keeps_whole_sum = self.plan.privacy is not None, self._keeps_whole_sum(task.model)
        gathers = None if sharding_of_launch() is None else Gathers(task.model, private=private)
        micro_batches = MicroBatches(
            self.train,
            self._shapes(task, gathers, keeps_whole_sum),
            self.tokenizer.pad_token_id,
            accelerator,
            in_step=gathers is not None,
            gathers=gathers,
            folder=self.folder.path,
            asked=self.asked,
        )
        pace = Pace(
            groups.optimization.updates,
            groups.output.eval_freq,
            eval_at_start=groups.output.eval_at_start,
            gradient_sync=groups.optimization.sync,
            loss_scale=self._loss_scale,
            keep_whole_sum=keeps_whole_sum,
            plain_max_grad_norm=None if private else groups.optimization.max_grad_norm or None,
            selection=groups.output.selection,
            averaging=groups.optimization.averaging,
            after_step=after_step,
            after_release=self._scores_of(task),
        )
        return train(task, self.plan, self.folder, micro_batches, pace, self.config, public_config(*self.groups))

    def _scores_of(self, task: CausalLMTask) -> DialScores | None:
        """What scores the dials after each release, with their coins in the run's folder; None without dials."""
        accelerator, config = self.folder.accelerator, self.plan.privacy
        if self.dials is None or task.dials is None or config is None:
            return None
        scores = DialScores(self.folder.path, self.dials, task.dials, config, is_main=accelerator.is_main_process)
        scores.begin()
        return scores

    def _shapes(self, task: CausalLMTask, gathers: Gathers | None, keeps_whole_sum: bool) -> Shapes:
        """The shapes of micro-batches, which fit in memory as far as a rehearsal can tell."""
        accelerator = self.folder.accelerator
        shapes = Shapes(
            self.groups.data.block_size,
            self.token_budget,
            self.plan.expected_batch_size / accelerator.num_processes,
            masked=False,  # causal attention needs no mask for padding on the right
            overhead=pass_overhead(accelerator=computes_apart(accelerator.device), sharded=is_sharded(task.model)),
            views=self.groups.views.views,
        )
        if not is_worthwhile(accelerator.device, gathers):
            return shapes
        rehearsal = Rehearsal(
            task.model,
            task.losses,
            self.plan,
            accelerator,
            rows_per_item=self.groups.privacy.unit.rows_at_once,
            loss_scale=self._loss_scale,
            gathers=gathers,
            keep_whole_sum=keeps_whole_sum,
            keeps_average=self.groups.optimization.averaging.is_on,
        )
        return rehearsal.settle(shapes)

    def load(self) -> CausalLMTask:
        """The model with its trained parameters, the same on every rank. Checks its gradients before a private run.

        A clip norm that was still open is measured: the task's `job` has it in its flags, plan and settings.

        Raises:
            InvalidArgument: the checkpoint is of another model, or the engine cannot compute the model's gradients.
        """
        groups, accelerator, sharding = self.groups, self.folder.accelerator, sharding_of_launch()
        set_seed(groups.optimization.seed)  # initial adapters; noise and sampling use secret keys
        whole = bool(groups.lora.trainable)
        model = load_model(
            groups.model.model_name_or_path,
            **groups.model.hub,
            dtype=torch.float32 if whole else self.dtype,
            device=accelerator.device,
            bits=groups.model.qbits,
            sharding=sharding,
            attention=groups.model.attn_implementation,
        )
        prepare_trainable(model, groups.lora)
        if sharding is not None:
            accelerator.print(describe_shards(model, accelerator.num_processes))
        identity = self.identity | model_identity(model)
        if self.folder.saved is not None and accelerator.is_main_process:
            refuse_other_beginning(self.folder.saved, identity)
        if self.plan.privacy is not None:
            self._check_neighbours(model)
        if recomputes(groups):
            checkpoint_activations(model)
        losses = in_autocast(CausalLMLoss(model), self.dtype if whole else torch.float32, accelerator.device)
        job = self._with_clip_norm(model, losses) if groups.privacy.clip_norm_is_open else self
        losses = with_token_dropout(losses, model, self.tokenizer, groups.views.token_dropout, accelerator.device)
        dials = None
        if job.dials is not None and job.plan.privacy is not None:
            dials = attach_dials(model, len(job.dials.included), accelerator.device)
            losses = DialLosses(losses, dials, job.plan.privacy.clip_norm)
        return CausalLMTask(job, model, losses, self.names if whole else None, identity, dials=dials)

    def _with_clip_norm(self, model: Any, losses: Losses) -> CausalLMJob:
        """The same job with a measured clip norm, which is the same on every rank. Every rank calls this."""
        accelerator, longest = self.folder.accelerator, self.groups.data.block_size
        measured = clip_norm_of_own_texts(model, losses, self.tokenizer, longest=longest, loss_scale=self._loss_scale)
        clip_norm = ranks_of(accelerator).from_main(lambda: measured)
        accelerator.print(f"clip norm              {clip_norm:g}, measured on texts that the model writes")
        groups = with_clip_norm(self.groups, clip_norm)
        config = present(self.plan.privacy, "mechanism")
        return replace(
            self,
            groups=groups,
            plan=replace(self.plan, privacy=replace(config, clip_norm=clip_norm)),
            config=self.config | {"clip_norm": clip_norm},
        )

    @property
    def _loss_scale(self) -> float:
        return loss_scale(self.dtype, whole=bool(self.groups.lora.trainable))

    def _keeps_whole_sum(self, model: Any) -> bool:
        """Whether every rank has room for a whole sum, if the trained weights are sharded. Every rank calls this."""
        parameters = trainable_parameters(model)
        if not are_sharded(parameters):
            return False
        trained = sum(parameter.numel() for parameter in parameters)
        return all(gather_object([keeps_whole_sum(trained, device_memory(self.folder.accelerator.device))]))

    def _check_neighbours(self, model: Any) -> None:
        """Refuse a model whose per-example gradients come out wrong, or whose rows affect each other.

        Two rows of the full length are tried, whatever the token budget: it may grow when the run resumes.
        """
        losses, scale, width = CausalLMLoss(model), self._loss_scale, self.groups.data.block_size
        device = self.folder.accelerator.device
        try:
            check_rules(model, lambda *rows: losses(*rows) * scale, device, width=width)
            if self.groups.lora.trainable and self.dtype == torch.float16:
                lower = in_autocast(losses, self.dtype, device)
                check_precision(model, losses, lower, device, width=width, scale=scale)
        except torch.OutOfMemoryError:
            remedy = "out of memory on two random rows of that length, on which the model is checked once; lower it"
            refuse("block_size", width, remedy)


@dataclass
class CausalLMTask:
    """Fine-tuning a causal language model; see `utils.training.task.Task`."""

    job: CausalLMJob
    model: Any
    losses: Losses
    trained: Sequence[str] | None
    identity: dict[str, Any]
    loss_unit: str = PER_TOKEN
    head: Sequence[str] = ()
    dials: torch.nn.Embedding | None = None

    @property
    def rows(self) -> TokenizedDataset:
        """The training set."""
        return self.job.train

    @property
    def base_model(self) -> str:
        """Name of the model that is fine-tuned, or its folder if its name on the hub is not known."""
        groups = self.job.groups
        return groups.card.base_model_name or groups.model.model_name_or_path

    @property
    def starts_from(self) -> tuple[PriorRelease, ...]:
        """The release that the adapters start from, and those before it."""
        return self.job.starts_from

    @property
    def artifact(self) -> Artifact:
        """What the run produces."""
        return LORA_ADAPTER if self.trained is None else WHOLE_MODEL

    @property
    def card(self) -> CardFields:
        """What the model card says besides the guarantee."""
        return self.job.groups.card.fields(recipe_of(self.job.groups, self.job.config["num_processes"]))

    @property
    def settings(self) -> dict[str, Any]:
        """What sampling must know of the training."""
        given = {"block_size": self.job.groups.data.block_size} | self.job.config
        told = {name: given[name] for name in (PROMPT_STYLE_OF_ROWS, TEMPLATE_DATE, "block_size") if name in given}
        count = self.job.groups.privacy.num_canaries
        return told | ({CANARIES_SETTING: count} if count else {})

    def evaluate(self, micro_batches: MicroBatches) -> dict[str, Any]:
        """The held-out loss, if there is held-out data."""
        held_out = self.job.held_out
        return {} if held_out is None else {"eval_loss": held_out_loss(self.losses, held_out, micro_batches)}

    def save(self, folder: Path) -> None:
        """Write the adapter or the whole model, with the tokenizer and without an audit's dials."""
        detach_dials(self.model)
        if self.trained is None:
            save_adapter(self.model, folder, base_model=self.base_model)
        else:
            save_trained_model(self.model, folder)
        self.job.tokenizer.save_pretrained(folder)

    def conclude(self, finished: Finished) -> list[str]:
        """Write the scores of the canaries, if there are any."""
        if self.job.canaries is not None:
            finish(finished.folder, self.model, self.losses, self.job.folder.accelerator.device)
        told = f"now run python -m dptune.audit training {finished.folder}"
        count = self.job.groups.privacy.num_canaries
        return [f"audit (not private)    {finished.folder / AUDIT_FOLDER}; {told}"] if count else []

    def help_save(self) -> None:
        """Of a whole model with sharded weights, every rank gathers each tensor."""
        if self.trained is not None and is_sharded(self.model):
            write_sharded(self.model, None)


def plan_job(groups: Groups, folder: RunFolder) -> CausalLMJob:
    """Plan a run, and print all that can be known before the weights are read.

    Raises:
        InvalidArgument: for a mistake in the flags, the data or the launch.
    """
    optimization, unit, accelerator = groups.optimization, groups.privacy.unit, folder.accelerator
    name, hub, saved = groups.model.model_name_or_path, groups.model.hub, folder.saved
    if groups.privacy.clip_norm_is_open and saved is not None and (began := saved.identity["clip_norm"]) is not None:
        groups = with_clip_norm(groups, began)
    target, private = target_of(groups.planning, accelerator), groups.privacy.is_private
    starts_from = ranks_of(accelerator).from_main(lambda: initial_releases(groups.lora, private=private))
    if is_configuration(name):
        refuse(
            "--model_name_or_path", name, "is a configuration, enough for --dry_run alone; give a folder with a model"
        )
    skeleton, names = prepared_skeleton(groups, target)
    whole_shards = sharding_of_launch() is not None and bool(groups.lora.trainable)
    tokenizer = load_tokenizer(name, **hub)
    day = runs_date(tokenizer, folder)
    machine = machine_of(accelerator)
    with held_meanwhile(folder):
        train, held_out = load_training_data(
            tokenizer=tokenizer,
            unit=unit,
            seed=optimization.seed,
            users_flag=groups.privacy.users_flag,
            run_folder=None if folder.output.dry_run else folder.path,
            day=day,
            machine=machine,
            **vars(groups.data),
        )

    canaries = None
    if count := groups.privacy.audit_canaries:
        canaries = canaries_of(count, tokenizer, folder, groups.data.block_size)
        train = with_canaries(train, canaries)
    dials = None
    if count := groups.privacy.audit_dials:
        require_worst_case(count, groups.clipping.style(layers_of(names).values()))
        dials = dials_of(count, folder)
        train = with_dials(train, dials)
    groups.output.require_selection(private=private, has_validation=held_out is not None, sharded=whole_shards)
    fingerprint, described = machine.once(lambda: look_at(train, held_out, groups, skeleton, tokenizer))
    processes = processes_of_plan(saved, optimization, target.processes)
    clipping = groups.clipping.style(layers_of(names).values())
    num_examples = num_sampled(unit, train)
    plan = plan_run(
        groups.privacy,
        optimization,
        num_examples=num_examples,
        world_size=processes,
        clipping=clipping,
        parts=train.parts,
        views=groups.views.views,
    )
    identity = {"training_data": fingerprint, "optimizer": optimization.optimizer, **optimization.averaging.identity}
    identity |= start_identity(starts_from)
    dated = {} if day is None else {TEMPLATE_DATE: day}
    identity |= dated
    if saved is not None:
        refuse_other_beginning(saved, mechanism_identity(plan) | identity)
    files = {name: in_words(getattr(groups.data, name)) for name in ("train_file", "validation_file")}
    made = {"num_processes": processes, PROMPT_STYLE_OF_ROWS: train.prompt_style}
    delta = {} if plan.privacy is None else {"delta": plan.privacy.delta}
    given = public_config(*groups) | files | made | delta | dated | (dict.fromkeys(OF_ADAPTER) if starts_from else {})
    config = resumed_config(given, saved, ON_RESUME)
    asked = token_budget_of(groups)
    token_budget = ranks_of(accelerator).from_main(lambda: remembered_budget(folder.path, asked))
    accelerator.print(*describe_run(plan, groups.privacy), *describe_clipping(plan, optimization), sep="\n")
    for line in describe_averaging(optimization.averaging, plan.steps):
        accelerator.print(line)
    accelerator.print(*describe_register(plan, folder.path, resumes=saved is not None), sep="\n")
    accelerator.print(*describe_changes(config, saved), sep="\n")
    accelerator.print(*described, *describe_start(starts_from), sep="\n")
    if token_budget != asked:
        accelerator.print(f"tokens at a time       {token_budget:,}; {asked:,} did not fit in memory before")
    memory = describe_memory_of(skeleton, groups, target, plan, token_budget)
    accelerator.print(*memory, *describe_noise(plan, num_trained(skeleton)), sep="\n")
    if folder.output.dry_run and accelerator.is_main_process:
        for line in describe_needed_data(plan):
            print(line)
    return CausalLMJob(
        groups,
        folder,
        target.dtype,
        names,
        tokenizer,
        train,
        held_out,
        plan,
        config,
        identity,
        token_budget,
        asked,
        starts_from,
        canaries,
        dials,
    )


def with_clip_norm(groups: Groups, clip_norm: float) -> Groups:
    """The flags with a clip norm that was open before."""
    return groups._replace(privacy=replace(groups.privacy, clip_norm=clip_norm))


def canaries_of(count: int, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, block_size: int) -> Canaries:
    """The canaries of a run, the same on every rank.

    Raises:
        InvalidArgument: weights are sharded, or see `canaries_of_run`.
    """
    _require_whole("--audit_canaries", count)
    special, resumed = set(tokenizer.all_special_ids), folder.saved is not None
    words = [token for token in range(len(tokenizer)) if token not in special]
    return ranks_of(folder.accelerator).from_main(
        lambda: canaries_of_run(count, folder.path, words, block_size, resumed=resumed)
    )


def dials_of(count: int, folder: RunFolder) -> Canaries:
    """The coins of a run's dials, the same on every rank.

    Raises:
        InvalidArgument: weights are sharded, or see `dials_of_run`.
    """
    _require_whole("--audit_dials", count)
    resumed = folder.saved is not None
    return ranks_of(folder.accelerator).from_main(lambda: dials_of_run(count, folder.path, resumed=resumed))


def _require_whole(flag: str, count: int) -> None:
    if sharding_of_launch() is not None:
        refuse(flag, count, "are scored on one process, which holds no whole model if it is sharded")


def prepared_skeleton(groups: Groups, target: Target) -> tuple[Any, list[str]]:
    """(the model without its weights, with adapters or its own trained parameters; the names of the trained ones).

    It finds a wrong target before gigabytes are read.

    Raises:
        InvalidArgument: no such model, or flags that do not fit it, its context or the devices.
    """
    model, dtype, private = groups.model, target.dtype, groups.privacy.is_private
    attention = model.attn_implementation
    skeleton = load_skeleton(model.model_name_or_path, **model.hub, attention=attention, dtype=dtype)
    require_context(skeleton, groups.data.block_size)
    names = prepare_trainable(skeleton, groups.lora, bits=model.qbits, dtype=dtype, private=private)
    require_different_views(groups.views, skeleton)
    whole_shards = sharding_of_launch() is not None and bool(groups.lora.trainable)
    require_works(groups.optimization.optimizer, target.device, sharded=whole_shards)
    return skeleton, names


def token_budget_of(groups: Groups) -> int:
    """The tokens of one forward pass that the flags ask for."""
    optimization = groups.optimization
    return optimization.max_tokens_per_device or optimization.per_device_train_batch_size * groups.data.block_size


def memory_settings(groups: Groups, target: Target, drawn: float, token_budget: int | None = None) -> MemorySettings:
    """What the memory of a run depends on besides the model.

    Args:
        groups: the flags.
        target: the devices.
        drawn: the number of rows that a step draws on average, over all processes.
        token_budget: tokens in one forward pass; None for what the flags ask for.
    """
    sharding = sharding_of_launch()
    return MemorySettings(
        target.dtype,
        token_budget or token_budget_of(groups),
        groups.data.block_size,
        recomputes(groups),
        target.processes,
        sharded=sharding is not None,
        offload=sharding is not None and sharding.cpu_offload,
        reshard=sharding is None or sharding.reshard_after_forward,
        bits=groups.model.qbits,
        drawn=drawn / target.processes,
        overhead=target.overhead(sharded=sharding is not None),
        rows_per_item=groups.privacy.unit.rows_at_once,
        keeps_average=groups.optimization.averaging.is_on,
        views=groups.views.views,
    )


def describe_memory_of(
    skeleton: Any, groups: Groups, target: Target, plan: RunPlan, token_budget: int | None = None
) -> list[str]:
    """Printed lines: the devices, the bound on forward passes, the number of parameters, the estimate of memory.

    Args:
        skeleton: see `prepared_skeleton`.
        groups: the flags.
        target: the devices.
        plan: for the number of rows that a step draws.
        token_budget: see `memory_settings`.
    """
    needed = memory_settings(groups, target, plan.expected_batch_size, token_budget)
    shapes = Shapes(
        needed.block_size,
        needed.token_budget,
        needed.drawn,
        masked=False,
        overhead=needed.overhead,
        views=needed.views,
    )
    return [
        *target.describe(sharded=needed.sharded),
        *describe_most_passes(plan, shapes, ranks=target.processes, rows_per_item=needed.rows_per_item),
        *describe_model(skeleton, needed, target.memory),
    ]


def runs_date(tokenizer: PreTrainedTokenizerBase, folder: RunFolder) -> str | None:
    """The day that the chat template tells: that on which the run began. None if it tells none. Every rank calls it."""
    if not tells_date(tokenizer):
        return None
    began = None if folder.saved is None else folder.saved.identity.get(TEMPLATE_DATE)
    return began or ranks_of(folder.accelerator).from_main(today)


def look_at(
    train: TokenizedDataset,
    held_out: TokenizedDataset | None,
    groups: Groups,
    skeleton: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, list[str]]:
    """(the fingerprint of the training data, printed lines about the data). Reads every token.

    Raises:
        InvalidArgument: the model lacks a token of the data, or there is nothing to learn or to measure.
    """
    name, rows = groups.model.model_name_or_path, {"training example": train, "held-out example": held_out}
    size = len(skeleton.get_input_embeddings().weight)
    used = {what: (one.ids_until(size), one.starts) for what, one in rows.items() if one is not None}
    require_embeddings(skeleton, tokenizer, name, used)
    require_something_to_learn(train, groups.data)
    require_answers(held_out, groups.data)
    return train.fingerprint(), describe_data(train, held_out)


@contextmanager
def held_meanwhile(folder: RunFolder) -> Iterator[None]:
    """Lock a run's folder, which holds rows in the block. One that is new is gone afterwards: nothing was written."""
    if folder.output.dry_run:
        yield
        return
    ranks = ranks_of(folder.accelerator)
    missing = missing_folders(folder.path)
    ranks.from_main(lambda: folder.lock.make(folder.path))
    try:
        yield
    finally:
        if ranks.is_main and missing:
            folder.lock.release()
            (folder.path / LOCK_NAME).unlink()
            remove_empty(missing)


def require_something_to_learn(train: TokenizedDataset, data: DataArguments) -> None:
    """Refuse training data without any answer token: the whole budget would buy a model of noise alone."""
    if train.num_without_answer == len(train):
        flag, roles = "--dataset_name", ""
        if data.train_file:
            flag = "--train_file"
            roles = roles_of(row for _, row in numbered(FileRows(find_files(data.train_file, flag), flag)))
        told = f"no training example has an answer token within --block_size {data.block_size}{roles}"
        source = in_words(data.train_file or data.dataset_name)
        refuse(flag, source, f"{told}; raise --block_size, or give examples with answers")


def require_answers(held_out: TokenizedDataset | None, data: DataArguments) -> None:
    """Refuse held-out data without any answer token: there would be no loss to measure."""
    if held_out is not None and held_out.num_without_answer == len(held_out):
        source = in_words(data.validation_file or data.train_file or data.dataset_name)
        remedy = f"no held-out example has an answer token within --block_size {data.block_size}"
        refuse("--validation_file", source, f"{remedy}; raise --block_size, or give examples with answers")


def recomputes(groups: Groups) -> bool:
    """Whether activations are recomputed in the backward pass instead of stored."""
    sharding = sharding_of_launch()
    return groups.optimization.gradient_ckpt or (sharding is not None and sharding.checkpoint_activations)


def recipe_of(groups: Groups, num_processes: int) -> str:
    """The command line of this run for its model card, without private names."""
    optimization, lora = groups.optimization, groups.lora
    always = [*_ALWAYS_TOLD, *([] if lora.trainable else ("lora_r", "lora_alpha", "lora_target_modules"))]
    always += [] if optimization.max_train_steps else ["num_train_epochs"]
    return command_line(
        f"accelerate launch --num_processes {num_processes} train_clm.py --output_dir OUT",
        *groups,
        always=always,
        never=[name for name, kind in ON_RESUME.items() if kind is OnResume.RUNTIME],
        shown=("lora_target_modules", "trainable", "layer_clip_norms", "noise_bands"),
        names={"model_name_or_path": published_name(groups.card.base_model_name or groups.model.model_name_or_path)},
    )
