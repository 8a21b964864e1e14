"""Turn the flags of train_classifier.py into a run: tasks, plans, and a model with its trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor

from dptune._validate import refuse
from dptune.accounting import planned_steps
from dptune.devices import computes_apart
from dptune.integrations.peft import class_logits
from dptune.pass_overhead import pass_overhead
from dptune.report.card import Artifact, published_name
from dptune.report.fields import CardFields
from dptune.report.prior import PriorRelease
from dptune.report.recipe import command_line
from dptune.run.folder import refuse_existing_run
from dptune.run.identity import mechanism_identity, model_identity, num_trained, weights_fingerprint
from dptune.run.plan import RunPlan, make_plan
from dptune.run.plan_lines import describe_noise
from dptune.shapes import Shapes
from dptune.units.unit import PrivacyUnit
from utils.classification.arguments import ON_RESUME, Settings
from utils.classification.dataset import ClassificationDataset
from utils.classification.files import (
    classifier_artifact,
    load_classifier,
    load_classifier_skeleton,
    save_classifier,
)
from utils.classification.head_arguments import HeadArguments
from utils.classification.label_words import describe_head, is_decoder, start_head, suffix_tokens
from utils.classification.losses import ClassificationLoss, check_classifier_rules, predict
from utils.classification.measured_defaults import measure_clip_norm, measure_head_rate, typical_gradient_norm
from utils.classification.metrics import scores
from utils.classification.modes import head_modules, head_parameters, prepare_mode
from utils.classification.outputs import (
    describe_scores,
    finished_results,
    last_scores,
    refuse_other_results,
    write_summary,
)
from utils.classification.tasks import ClassificationTask, load_file_task, load_task
from utils.cli.flags import public_config
from utils.cli.launch import compute_dtype, describe_precision, ranks_of, sharding_of_launch
from utils.models.embeddings import require_embeddings
from utils.models.loading import require_context
from utils.models.trainable import Losses, in_autocast
from utils.training.changes import OnResume, describe_changes, resumed_config
from utils.training.loop import Pace
from utils.training.micro_batches import MicroBatches, remembered_budget
from utils.training.optimizers import UpdateSettings, require_works
from utils.training.plan import describe_most_passes
from utils.training.resume import OTHER_FILES, refuse_other_beginning
from utils.training.run import open_folder, train
from utils.training.task import PER_EXAMPLE, Finished
from utils.training.views import require_different_views, with_token_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORT = 0.5  # of a typical gradient norm: at a third of it, full mode predicted only the majority class
# Settings that the model card states, even at their defaults.
_ALWAYS_TOLD = ("finetune_mode", "block_size", "batch_size", "num_train_epochs", "optimizer", "lr_scheduler_type")


def load_tasks(settings: Settings, tokenizer: Any) -> list[ClassificationTask]:
    """The tasks of --datasets, or the one of --train_file, tokenised.

    Raises:
        InvalidArgument: data that are missing or cannot be read, or one checkpoint to resume several tasks from.
    """
    data, resume, length = settings.data, settings.results.resume_from_checkpoint, settings.checkpoint.block_size
    load = partial(
        load_task,
        tokenizer=tokenizer,
        max_length=length,
        data_dir=data.data_dir,
        max_train_examples=data.max_train_examples,
        seed=settings.steps.seed,
    )
    if data.train_file is None:
        names = data.datasets or []  # `TaskArguments` has exactly one of the two
        if resume not in (None, "latest") and len(names) > 1:
            refuse("--resume_from_checkpoint", resume, "belongs to one task; give latest, or only that task")
        suffixes = [suffix_tokens(tokenizer, head_of(name, settings).prompt_suffix) for name in names]
        return [
            _with_embeddings(load(name, suffix=suffix), settings, tokenizer)
            for name, suffix in zip(names, suffixes, strict=True)
        ]
    task = load_file_task(
        data.train_file,
        data.validation_file,
        text_columns=data.text_columns or [],
        label_column=data.labels_in,
        class_names=data.class_names,
        tokenizer=tokenizer,
        max_length=length,
        max_train_examples=data.max_train_examples,
        seed=settings.steps.seed,
        suffix=suffix_tokens(tokenizer, head_of(data.train_file, settings).prompt_suffix),
        refuse_users=settings.budget.enable_dp and not settings.budget.ignore_users,
    )
    return [_with_embeddings(task, settings, tokenizer)]


def head_of(task: str, settings: Settings) -> HeadArguments:
    """The head's flags for a task, with its words in place of `auto`.

    Raises:
        InvalidArgument: they do not fit the model or the task, or the model cannot be loaded.
    """
    if not settings.head.is_given:
        return settings.head
    skeleton = load_classifier_skeleton(settings.checkpoint.model_name_or_path)
    return settings.head.of_task(task, decoder=is_decoder(skeleton))


def _with_embeddings(task: ClassificationTask, settings: Settings, tokenizer: Any) -> ClassificationTask:
    """The task; refuses a model without an embedding of one of its tokens."""
    name = settings.checkpoint.model_name_or_path
    data = {"training row": task.train, **{f"{split} row": rows for split, rows in task.validation.items()}}
    used = {what: (rows.ids, rows.starts) for what, rows in data.items()}
    require_embeddings(load_classifier_skeleton(name), tokenizer, name, used, flag="--model_name_or_path")
    return task


class PlannedTask(NamedTuple):
    """A task, its settings with its label words and measured defaults filled in, and its plan of steps and noise."""

    task: ClassificationTask
    settings: Settings
    plan: RunPlan


def plan_task(task: ClassificationTask, settings: Settings, tokenizer: Any, accelerator: Accelerator) -> PlannedTask:
    """Plan one task; every rank calls it. The logical batch does not depend on the number of processes.

    Raises:
        InvalidArgument: a batch larger than the data set, a delta of 1/n or more, a target epsilon out of reach, label
            words that do not fit the classes, or a model that cannot be loaded to measure the clip norm.
    """
    settings = settings._replace(head=head_of(task.name, settings))
    settings.head.require_one_each(task.class_names, task.name)
    batch, examples = settings.steps.batch_size, len(task.train)
    if batch > examples:
        refuse("--batch_size", batch, f"{task.name} has {examples} training examples; give at most that")
    steps = planned_steps(num_examples=examples, expected_batch_size=batch, epochs=settings.steps.num_train_epochs)
    require_works(settings.steps.optimizer, accelerator.device, sharded=False)
    output = settings.results.of_task(settings.folder)
    output.require_selection(private=settings.budget.enable_dp, has_validation=bool(task.validation))
    if settings.budget.clip_norm_is_open:
        model = load_in_mode(task, settings, tokenizer).model.to(accelerator.device)
        (clip_norm,) = broadcast_object_list([measure_clip_norm(model)])
        settings = settings._replace(budget=replace(settings.budget, clip_norm=clip_norm))
    plan = make_plan(
        settings.budget.settings(),
        num_examples=examples,
        batch=batch,
        steps=steps,
        unit=PrivacyUnit(views=settings.views.views),
        test_seed=settings.budget.insecure_test_seed,
        max_batch=settings.budget.max_batch,
    )
    return PlannedTask(task, settings, plan)


def describe_setup(settings: Settings) -> list[str]:
    """Printable lines: the mode, and whether the clip norm is measured."""
    lines = [f"fine-tuning mode       {settings.mode.finetune_mode}"]
    if settings.budget.clip_norm_is_open:
        lines.append("--clip_norm            measured, just above a typical gradient at the start, on random tokens")
    return lines


def shapes_of(settings: Settings, plan: RunPlan, accelerator: Accelerator, token_budget: int) -> Shapes:
    """The shapes of a task's micro-batches of at most so many tokens."""
    return Shapes(
        settings.checkpoint.block_size,
        token_budget,
        plan.expected_batch_size / accelerator.num_processes,
        overhead=pass_overhead(accelerator=computes_apart(accelerator.device)),
        views=settings.views.views,
    )


def describe_passes(planned: PlannedTask, accelerator: Accelerator) -> list[str]:
    """A printable line if draws are cut: how many forward passes a step takes at most."""
    settings, plan = planned.settings, planned.plan
    return describe_most_passes(
        plan,
        shapes_of(settings, plan, accelerator, settings.token_budget),
        ranks=accelerator.num_processes,
        virtual_tokens=settings.virtual_tokens,
    )


def describe_rates(updates: UpdateSettings, *, chosen: bool) -> str:
    """The peak learning rates in a printable line; `chosen` says whether the user gave --learning_rate."""
    given = "" if chosen else " (default of this mode)"
    same = updates.head_learning_rate == updates.learning_rate
    head = "" if same else f", {updates.head_learning_rate:g} for the head"
    return f"learning rate          {updates.learning_rate:g}{given}{head}"


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


def identity_of(planned: PlannedTask, trained: Trained) -> dict[str, Any]:
    """What a resumed run must share, as JSON values. Process counts and micro-batch sizes may differ."""
    task, settings, plan = planned
    selection = settings.results.of_task(settings.folder).selection
    return (
        _known_beginning(planned)
        | {"training_data": task.train.fingerprint()}
        | {
            **asdict(trained.updates),
            **settings.steps.averaging.identity,
            "max_grad_norm": settings.budget.plain_max_grad_norm,
            "steps": plan.steps,
            "seed": settings.steps.seed,
            "max_length": settings.checkpoint.block_size,
            "checkpoint": trained.checkpoint,
            **model_identity(trained.model),
        }
        | ({"selection": asdict(selection)} if selection.decides else {})
    )


def _known_beginning(planned: PlannedTask) -> dict[str, Any]:
    """The part of it that is known before the model is loaded.

    Mode and head come first: a measured clip norm follows them, and would be named in their place.
    """
    settings = planned.settings
    head = vars(settings.head) if settings.head.is_given else {}
    return vars(settings.mode) | head | mechanism_identity(planned.plan)


class Trained(NamedTuple):
    """A model in its mode, its trained parameters, how they are updated, and a fingerprint of the starting weights."""

    model: Any
    names: list[str]
    updates: UpdateSettings
    checkpoint: str


@dataclass
class ClassifierTask:
    """Fine-tuning a classifier; see `utils.training.task.Task`."""

    planned: PlannedTask
    fine_tuned: Trained
    tokenizer: PreTrainedTokenizerBase
    losses: Losses
    logits: Callable[[Mapping[str, Tensor]], Tensor]
    loss_unit: str = PER_EXAMPLE
    starts_from: tuple[PriorRelease, ...] = ()

    @property
    def model(self) -> Any:
        """The classifier in its mode."""
        return self.fine_tuned.model

    @property
    def rows(self) -> ClassificationDataset:
        """The training split."""
        return self.planned.task.train

    @property
    def trained(self) -> list[str]:
        """Names of the trained parameters."""
        return self.fine_tuned.names

    @property
    def head(self) -> list[str]:
        """Names of the trained parameters of the classification head."""
        return head_parameters(self.model, self.fine_tuned.names)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return identity_of(self.planned, self.fine_tuned)

    @property
    def base_model(self) -> str:
        """Name of the checkpoint that is fine-tuned, or its folder if its name on the hub is not known."""
        settings = self.planned.settings
        return settings.card.base_model_name or settings.checkpoint.model_name_or_path

    @property
    def artifact(self) -> Artifact:
        """A whole model, an adapter, or both."""
        return classifier_artifact(self.model, suffix=self.planned.settings.head.prompt_suffix)

    @property
    def card(self) -> CardFields:
        """What the model card says besides the guarantee."""
        return self.planned.settings.card.fields(classifier_recipe(self.planned, self.fine_tuned.updates))

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the classifier must know of the training."""
        head = self.planned.settings.head
        return {
            "max_length": self.planned.settings.checkpoint.block_size,
            "class_names": list(self.planned.task.class_names),
            **{name: value for name, value in vars(head).items() if value is not None},
        }

    def evaluate(self, micro_batches: MicroBatches) -> dict[str, Any]:
        """Loss and scores on the validation splits, if there are any."""
        found, total, rows = {}, 0.0, 0
        task = self.planned.task
        for split, data in task.validation.items():
            classes, loss = predict(self.logits, data, micro_batches)
            found[split] = scores(data.labels, classes, task.metrics)
            total, rows = total + loss * len(data), rows + len(data)
        return {"eval_loss": total / rows, "scores": found} if rows else {}

    def save(self, folder: Path) -> None:
        """Write the trained model or adapter, with the tokenizer."""
        save_classifier(self.model, self.tokenizer, folder, base_model=self.base_model)

    def conclude(self, finished: Finished) -> list[str]:
        """Write `results.json`, which is not private."""
        task = self.planned.task
        write_summary(finished, task, self.planned.settings, num_trained(self.model))
        return describe_scores(task, last_scores(finished))

    def help_save(self) -> None:
        """Nothing: every rank holds the whole classifier."""


def classifier_recipe(planned: PlannedTask, updates: UpdateSettings) -> str:
    """The command line of this run for its model card, without private names."""
    settings = planned.settings
    task = f" --datasets {planned.task.name}" if settings.data.datasets else ""
    name = settings.card.base_model_name or settings.checkpoint.model_name_or_path
    return command_line(
        f"python train_classifier.py --output_dir OUT{task}",
        *settings,
        always=_ALWAYS_TOLD,
        never=[name for name, kind in ON_RESUME.items() if kind is OnResume.RUNTIME],
        shown=("label_words", "lora_target_modules", "noise_bands"),
        names={
            "model_name_or_path": published_name(name),
            "learning_rate": f"{updates.learning_rate:g}",
            "head_learning_rate": f"{updates.head_learning_rate:g}",
        },
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
    trained = load_in_mode(planned.task, planned.settings, tokenizer)
    refuse_other_results(found, identity_of(planned, trained))
    return True


def run_task(planned: PlannedTask, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> bool:
    """Train and save one task; returns False if a signal stopped it. A dry run stops before training."""
    task, settings, plan = planned
    output, dtype = settings.results.of_task(settings.folder / task.name), dtype_of_launch(accelerator)
    with open_folder(output, accelerator) as folder:
        if folder.saved is not None:
            refuse_other_beginning(folder.saved, _known_beginning(planned))
        launch = {"task": task.name, "num_processes": accelerator.num_processes}
        delta = {} if plan.privacy is None else {"delta": plan.privacy.delta}
        config = resumed_config(public_config(*settings) | launch | delta, folder.saved, ON_RESUME)
        for line in [*describe_changes(config, folder.saved), *describe_precision(dtype, accelerator.device)]:
            accelerator.print(line)
        trained = load_trained(planned, tokenizer, accelerator)
        if output.dry_run:
            return True
        losses = in_autocast(ClassificationLoss(trained.model), dtype, accelerator.device)
        dropout = settings.views.token_dropout
        losses = with_token_dropout(losses, trained.model, tokenizer, dropout, accelerator.device)
        logits = in_autocast(partial(class_logits, trained.model), dtype, accelerator.device)
        budget = ranks_of(accelerator).from_main(lambda: remembered_budget(folder.path, settings.token_budget))
        micro_batches = MicroBatches(
            task.train,
            shapes_of(settings, plan, accelerator, budget),
            tokenizer.pad_token_id,
            accelerator,
            virtual_tokens=settings.virtual_tokens,
        )
        epoch = max(1, round(1 / plan.sampling_probability))
        eval_freq, clip = settings.results.eval_freq or epoch, settings.budget.plain_max_grad_norm
        pace = Pace(
            trained.updates,
            eval_freq,
            plain_max_grad_norm=clip,
            selection=output.selection,
            averaging=settings.steps.averaging,
        )
        end = train(
            ClassifierTask(planned, trained, tokenizer, losses, logits),
            plan,
            folder,
            micro_batches,
            pace,
            config,
            public_config(*settings),
        )
        return end.stopped_by is None


def load_trained(planned: PlannedTask, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> Trained:
    """A fresh model in its mode on this rank's device, the same on every rank; a private one passes a gradient check.

    Raises:
        InvalidArgument: no such model, a mode that does not fit it, a --block_size beyond its context, or layers that
            the engine does not support.
    """
    task, settings, plan = planned
    trained = load_in_mode(task, settings, tokenizer)
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


def load_in_mode(task: ClassificationTask, settings: Settings, tokenizer: Any) -> Trained:
    """The same model on the CPU, without the comparison of gradients."""
    set_seed(settings.steps.seed)  # for the new weights
    name, mode = settings.checkpoint.model_name_or_path, settings.mode
    model, new = load_classifier(name, task.class_names, pad_token_id=tokenizer.pad_token_id)
    if (words := settings.head.label_words) is not None:
        start_head(model, words, tokenizer, suffix=settings.head.prompt_suffix, name=name)
    longest, virtual = settings.checkpoint.block_size, settings.virtual_tokens
    require_context(model, longest, flag="--block_size", virtual_tokens=virtual)
    updates = settings.updates(partial(measure_head_rate, model))
    fresh = tuple(f"{module}." for module in [*head_modules(model), *new])
    checkpoint = weights_fingerprint(named for named in model.named_parameters() if not named[0].startswith(fresh))
    flags = vars(mode) | {"also_trained": new}
    model, names = prepare_mode(model, flags.pop("finetune_mode"), **flags)
    require_different_views(settings.views, model)
    return Trained(model, names, updates, checkpoint)
