"""Load what train_classifier.py trained, whatever its mode, and predict the classes of texts.

Shapes: B texts at once, N texts, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from dptune._validate import refuse
from dptune._words import counted
from dptune.adapter_files import PEFT_CONFIG_NAME
from dptune.integrations.peft import KNOWN_METHODS, PREFIX, PROMPT, class_logits, method_of
from dptune.published import PUBLISH_NAME, published_model, published_part
from dptune.shapes import Shapes
from utils.classification.dataset import tokenize_texts
from utils.classification.files import ADAPTER_NAME, load_classifier, load_classifier_tokenizer
from utils.classification.label_words import suffix_tokens
from utils.classification.labelled_texts import LabelledTexts
from utils.classification.losses import logits_of
from utils.cli.flags import naming
from utils.data.tokenization import IGNORED
from utils.files.folders import recorded_by_training
from utils.models.embeddings import require_embeddings
from utils.models.loading import refuse_to_load, require_context
from utils.training.micro_batches import MicroBatches

FLAG, BASE_FLAG, LENGTH_FLAG = "--model_path", "--model_name_or_path", "--block_size"
_REMEDY = "give the folder of a finished run of train_classifier.py, OUT/TASK"
_CLASSIFIER = "ForSequenceClassification"  # how transformers ends the names of their classes


class TrainedClassifier(NamedTuple):
    """A classifier in float32 and evaluation mode, its tokenizer, its classes by number, its longest row, what follows
    every text, and how many texts a row has (None if its run did not say)."""

    model: Any
    tokenizer: Any
    class_names: tuple[str, ...]
    max_length: int
    prompt_suffix: str | None = None
    num_texts: int | None = None

    @property
    def virtual_tokens(self) -> int:
        """How many positions a prefix or soft prompt adds before each text."""
        adds = method_of(self.model) in (PREFIX, PROMPT)
        return int(self.model.active_peft_config.num_virtual_tokens) if adds else 0


def load_trained_classifier(
    path: str, *, base: str | None = None, max_length: int | None = None, device: torch.device | str = "cpu"
) -> TrainedClassifier:
    """The classifier that a run left.

    Args:
        path: the folder of a task's finished run, or its folder `publish`.
        base: the checkpoint that an adapter belongs to, by folder or hub name; None for the one that it names.
        max_length: maximum number of tokens per text; None for that of the training.
        device: where the model computes.

    Raises:
        InvalidArgument: there is no classifier, it is incomplete, or `max_length` is unknown or beyond its context.
    """
    folder = _folder_of(path)
    with naming({"model_name_or_path": FLAG}):
        tokenizer = load_classifier_tokenizer(str(folder))
    if (folder / "config.json").is_file():
        if base is not None:
            refuse(BASE_FLAG, base, f"is not read: {path} holds a whole classifier; leave it out")
        model, names = _load_whole(folder)
        adapter = folder / ADAPTER_NAME
        model = _load_adapter(model, adapter) if adapter.is_dir() else model
    else:
        model, names = _load_on_base(folder, tokenizer, base)
    longest = max_length or next((one for one in recorded_by_training(folder, "max_length") if _is_count(one)), None)
    if not isinstance(longest, int):
        refuse(LENGTH_FLAG, None, f"{path} does not say how long texts may be; give the training's")
    suffix = next((one for one in recorded_by_training(folder, "prompt_suffix") if isinstance(one, str)), None)
    texts = next((one for one in recorded_by_training(folder, "num_texts") if isinstance(one, int)), None)
    found = TrainedClassifier(model.to(device).eval(), tokenizer, names, longest, suffix, texts)
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    require_context(plain, longest, flag=LENGTH_FLAG, virtual_tokens=found.virtual_tokens)
    return found


def predictions(
    classifier: TrainedClassifier, texts: tuple[list[str], ...], accelerator: Accelerator, *, batch_size: int
) -> Iterator[dict[str, object]]:
    """A prediction for each text, in order; every rank calls it and gets all of them.

    Args:
        classifier: on the accelerator's device.
        texts: one column of N texts, or two for pairs.
        accelerator: the ranks that share the work.
        batch_size: B of texts of the longest length; of shorter ones there are more.

    Yields:
        The class number ("label"), its name ("class_name"), and every class's probability by name ("probabilities").

    Raises:
        InvalidArgument: the training had another number of texts per row, or the tokenizer makes something of a text
            that the model does not know.
    """
    model, tokenizer, names, max_length, suffix, num_texts = classifier
    if num_texts not in (None, len(texts)):
        told = f"the classifier was trained on {counted(num_texts or 0, 'text')} per row; name as many columns"
        refuse("--text_columns", len(texts), told)
    unlabelled = np.full(len(texts[0]), IGNORED, dtype=np.int64)
    with naming({"model_name_or_path": FLAG}):
        data = tokenize_texts(LabelledTexts(texts, unlabelled), tokenizer, max_length, suffix_tokens(tokenizer, suffix))
    require_embeddings(model, tokenizer, type(model).__name__, {"row": (data.ids, data.starts)}, flag=FLAG)
    shapes = Shapes(max_length, batch_size * (max_length + classifier.virtual_tokens))
    micro_batches = MicroBatches(
        data, shapes, tokenizer.pad_token_id, accelerator, virtual_tokens=classifier.virtual_tokens
    )
    logits_NC = logits_of(partial(class_logits, model), data, micro_batches)
    for probabilities in logits_NC.double().softmax(1).tolist():
        label = int(np.argmax(probabilities))
        yield {
            "label": label,
            "class_name": names[label],
            "probabilities": dict(zip(names, probabilities, strict=True)),
        }


def _folder_of(path: str) -> Path:
    """The folder with the classifier's files."""
    folder = published_part(path)
    if not any((folder / name).is_file() for name in ("config.json", PEFT_CONFIG_NAME)):
        tasks = sorted(one.parent.name for one in Path(path).glob(f"*/{PUBLISH_NAME}"))
        told = f"; it holds the runs of {', '.join(tasks)}" if tasks else ""
        refuse(FLAG, path, f"holds no classifier{told}; {_REMEDY}")
    return folder


def _load_whole(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """A whole classifier of the transformers library, and its class names."""
    try:
        kinds = AutoConfig.from_pretrained(folder).architectures or ["a model of unknown kind"]
        if not kinds[0].endswith(_CLASSIFIER):
            _refuse_other(folder, kinds[0])
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:  # also of damaged files
        refuse_to_load("classifier", str(folder), error, flag=FLAG, remedy=_REMEDY)
    if missing := sorted(info["missing_keys"]):
        refuse(FLAG, str(folder), f"lacks {counted(len(missing), 'weight')} such as {missing[0]}; {_REMEDY}")
    return model, tuple(name for _, name in sorted(model.config.id2label.items()))


def _load_on_base(folder: Path, tokenizer: Any, base: str | None) -> tuple[Any, tuple[str, ...]]:
    """What PEFT trained, head included, on the checkpoint that it began with."""
    config = PeftConfig.from_pretrained(str(folder))
    if config.task_type != "SEQ_CLS":
        _refuse_other(folder, f"an adapter for {config.task_type}")
    names = next((one for one in recorded_by_training(folder, "class_names") if isinstance(one, list)), None)
    if names is None:
        refuse(FLAG, str(folder), "nothing there names the classes; restore dptune_settings.json beside the adapter")
    name = published_model(base or config.base_model_name_or_path)
    model, _ = load_classifier(name, names, pad_token_id=tokenizer.pad_token_id)
    return _load_adapter(model, folder), tuple(names)


def _load_adapter(model: Any, folder: Path) -> Any:
    """`model` with what PEFT trained."""
    method = str(PeftConfig.from_pretrained(str(folder)).peft_type.value)
    if method not in KNOWN_METHODS:
        refuse(FLAG, str(folder), f"PEFT's {method} is not a method of train_classifier.py; {_REMEDY}")
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # damaged, or of another model
        remedy = f"give the checkpoint that it was trained from with {BASE_FLAG}"
        refuse_to_load("adapter", str(folder), error, flag=FLAG, remedy=remedy)


def _refuse_other(folder: Path, kind: str) -> NoReturn:
    refuse(FLAG, str(folder), f"holds {kind}, not a classifier; {_REMEDY}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0
