"""The data of train_classifier.py as its flags ask for them: tasks, tokenised, with the suffix of each text."""

from __future__ import annotations

from functools import partial
from typing import Any

from dptune._validate import refuse
from utils.classification.arguments import Settings
from utils.classification.files import load_classifier_skeleton
from utils.classification.head_arguments import HeadArguments
from utils.classification.label_words import is_decoder, suffix_tokens
from utils.classification.tasks import ClassificationTask, load_file_task, load_task
from utils.models.embeddings import require_embeddings


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
