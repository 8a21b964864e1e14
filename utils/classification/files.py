"""Load a sentence classifier, and save one in files that the standard libraries read.

The folder holds a whole classifier, with LoRA merged into its weights, or what PEFT trained, which belongs to the
starting checkpoint. If a mode trains both, the folder holds the whole classifier and, in `adapter`, what PEFT trained
on top of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, PreTrainedConfig

from dptune._validate import refuse
from dptune._words import counted
from dptune.adapter_files import PEFT_CONFIG_NAME
from dptune.lora import adapters, merge_lora, unmerge_lora
from dptune.report.card import Artifact
from utils.classification.modes import head_modules
from utils.models.gguf import refuse_gguf
from utils.models.loading import refuse_to_load

ADAPTER_NAME = "adapter"  # the folder of an adapter on top of a whole classifier

_FLAG = "--model_name_or_path"
_REMEDY = "give a folder with an encoder or a decoder and its tokenizer, or a hub name"

_USE_MODEL = """\
In the folder of this card:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""
_USE_ADAPTER = """\
In the folder of this card, with [PEFT](https://github.com/huggingface/peft) and dptune:

```python
from dptune.integrations.peft import class_logits
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained({load})
model = PeftModel.from_pretrained(base, "{folder}").eval()
tokenizer = AutoTokenizer.from_pretrained(".", padding_side="right")
logits = class_logits(model, tokenizer(["a text"], return_tensors="pt", padding=True))
```

`class_logits` keeps padding from changing the logits of a batch with a prefix or a soft prompt. A single text does not
need it.
"""
_USE_SUFFIX = """
Every text must end with `{suffix}`, as in the training.
"""


def load_classifier_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name, with padding on the right. The end token pads if there is no pad token.

    Raises:
        InvalidArgument: the tokenizer cannot be loaded, or has neither a pad nor an end token.
    """
    refuse_gguf(name, _FLAG, "classifiers do not read a GGUF file")
    adapter = (Path(name) / PEFT_CONFIG_NAME).is_file()  # a folder without a model's configuration
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, config=None if adapter else _config(name))
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        refuse_to_load("tokenizer", name, error, flag=_FLAG, remedy=_REMEDY)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            refuse(_FLAG, name, "its tokenizer has neither a pad nor an end token; set one in tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_classifier(name: str, class_names: Sequence[str], *, pad_token_id: int) -> tuple[Any, list[str]]:
    """A classifier with the weights of a folder or hub name, in float32 and in evaluation mode.

    A head that the checkpoint lacks, or has for another number of classes, is drawn anew from torch's generator.

    Args:
        name: folder or hub name.
        class_names: classes of the task, by class number.
        pad_token_id: the tokenizer's pad token, used if the model names none.

    Returns:
        The model, and the names of other new modules (a pooler) that must be trained too.

    Raises:
        InvalidArgument: the model cannot be loaded, lacks other weights, is an encoder-decoder, or does not fit the
            tokenizer.
    """
    try:
        config = _config(name)
        config.num_labels = len(class_names)  # before the names, which it would replace
        config.id2label = dict(enumerate(class_names))
        config.label2id = {label: number for number, label in enumerate(class_names)}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        refuse_to_load("model", name, error, flag=_FLAG, remedy=_REMEDY)
    if model.config.is_encoder_decoder:
        refuse(_FLAG, name, f"{model.config.model_type} is an encoder-decoder; give an encoder or a decoder")
    if pad_token_id >= (size := len(model.get_input_embeddings().weight)):
        told = f"its tokenizer pads with token {pad_token_id}, but the model has only {size} embeddings"
        refuse(_FLAG, name, f"{told}; give a model with its own tokenizer")
    if model.config.pad_token_id is None:
        # Not earlier: the model would freeze the embedding of its pad token, which may be the end token.
        model.config.pad_token_id = pad_token_id
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    heads = tuple(f"{head}." for head in head_modules(model))
    others = sorted(key for key in new if not key.startswith(heads))
    if lost := [key for key in others if "pooler" not in key]:
        refuse(_FLAG, name, f"its checkpoint lacks {counted(len(lost), 'weight')} such as {lost[0]}; {_REMEDY}")
    return model.eval(), sorted({key.rpartition(".")[0] for key in others})


def load_classifier_skeleton(name: str) -> Any:
    """The classifier of a folder or hub name without its weights, on the meta device. Errors as `load_classifier`'s."""
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(_config(name))
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        refuse_to_load("model", name, error, flag=_FLAG, remedy=_REMEDY)


def save_classifier(model: Any, tokenizer: Any, folder: Path, *, base_model: str) -> None:
    """Write the trained parts and the tokenizer.

    Args:
        model: as returned by `utils.classification.modes.prepare_mode`.
        tokenizer: saved beside the model.
        folder: where the files go; must exist.
        base_model: name or path of the starting checkpoint, for PEFT's configuration.
    """
    in_peft = isinstance(model, PeftModel)
    whole = not in_peft or any(adapters(model))
    if whole:
        _save_plain(model.get_base_model() if in_peft else model, folder)
    if in_peft:
        _save_adapter(model, folder / ADAPTER_NAME if whole else folder, "." if whole else base_model)
    tokenizer.save_pretrained(folder)


def classifier_artifact(model: Any, *, suffix: str | None = None) -> Artifact:
    """What the model card says about the files of `save_classifier`. The suffix is what ended every text."""
    ending = (
        "" if suffix is None else _USE_SUFFIX.replace("{suffix}", repr(suffix).replace("{", "{{").replace("}", "}}"))
    )
    if not isinstance(model, PeftModel):
        use = _USE_MODEL + ending
        return Artifact("model", "classifier trained from", "transformers", ("text-classification",), use)
    folder, load = ".", f'"{{base}}", num_labels={model.config.num_labels}'
    if model.config.pad_token_id is not None:
        load += f", pad_token_id={model.config.pad_token_id}"
    if any(adapters(model)):
        folder, load = ADAPTER_NAME, '"."'
    use = _USE_ADAPTER.replace("{load}", load).replace("{folder}", folder) + ending
    method = model.active_peft_config.peft_type.value.lower().replace("_", "-")
    return Artifact("classifier", f"classifier ({method}) for", "peft", ("text-classification", method), use)


def _config(name: str) -> PreTrainedConfig:
    """The model's configuration. Google's small BERTs, such as prajjwal1/bert-tiny, do not name their model type."""
    try:
        return AutoConfig.from_pretrained(name)
    except ValueError:
        given, _ = PreTrainedConfig.get_config_dict(name)
        if "model_type" in given or "type_vocab_size" not in given:
            raise
        return BertConfig.from_pretrained(name)


def _save_plain(model: Any, folder: Path) -> None:
    """Save a classifier with its adapters merged; `model` itself is unchanged afterwards."""
    merge_lora(model)
    try:
        model.save_pretrained(folder, state_dict=_plain_state(model))
    finally:
        unmerge_lora(model)


def _plain_state(model: Any) -> dict[str, Tensor]:
    """Weights under the names of the model's own class, with the trained head, not PEFT's copy of the original."""
    state = {key: value for key, value in model.state_dict().items() if ".lora." not in key}
    return {
        key.replace(".modules_to_save.default.", "."): value
        for key, value in state.items()
        if ".original_module." not in key
    }


def _save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    model.active_peft_config.base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; the run has a card of its own
