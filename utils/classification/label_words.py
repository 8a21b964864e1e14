"""Starts a classification head from the model's own words instead of random numbers (`--label_words`).

The user writes a word or a short description for each class. No data are read, so epsilon is unchanged. The method
depends on the kind of model:

- A decoder's head is a linear layer on the last token's hidden state, like the output layer that predicts the next
  word. So a class's row is the output embedding of its word. The classifier then predicts the class whose word the
  model would write next. This works best after a suffix such as " It was" (Gao et al. 2021, "Making pre-trained
  language models better few-shot learners", call the two a prompt and label words).
- An encoder's head reads one vector for the whole text, and no output layer reads that vector. So each description is
  run through the model as a text. The vector that reaches the head's last layer becomes the class's row, as with the
  prototypes of Snell et al. 2017 ("Prototypical networks for few-shot learning"), which average examples instead.

Rows are centred over the classes, which leaves the softmax as it is. Some words are likely after any text. The head is
corrected for that, so that an empty text prefers no class (Zhao et al. 2021, "Calibrate before use: improving few-shot
performance of language models"). The layer's bias corrects it. Without a bias, each row loses its component along the
empty text's vector.

Shapes: B texts, C classes, D the input of the head's last layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dptune._validate import HIDDEN, refuse
from dptune.integrations.peft import class_logits
from utils.classification.dataset import tokenize_texts
from utils.classification.head_arguments import SUFFIX_FLAG, WORDS_FLAG, words_listed
from utils.classification.labelled_texts import LabelledTexts
from utils.classification.modes import head_modules
from utils.models.loading import refuse_to_load

_TEXT = "a"  # stands for any text before a suffix
_ROOM = 8  # tokens of an empty text with its special tokens
_LEAST_SPREAD = 1e-3  # of the prototypes around their mean, relative to their length: less may be rounding
_MARGIN = 1.0


def is_decoder(model: Any) -> bool:
    """Whether a classifier of the transformers library reads the last token, as `class_logits` tells them apart."""
    return hasattr(model, "score")


def suffix_tokens(tokenizer: Any, suffix: str | None) -> list[int]:
    """The tokens of a suffix behind a text; none without one.

    Raises:
        InvalidArgument: they depend on the text, or the tokenizer ends each text with a special token.
    """
    if suffix is None:
        return []
    if tokenizer(_TEXT)["input_ids"][-1] in tokenizer.all_special_ids:
        remedy = "the tokenizer ends every text with a special token, so no suffix can follow; leave it out"
        refuse(SUFFIX_FLAG, suffix, remedy)
    found = _tokens_after(tokenizer, _TEXT, suffix)
    if not found:
        refuse(SUFFIX_FLAG, suffix, "its tokens depend on the text before it; begin it with a space or a line break")
    return found


@torch.no_grad()
def start_head(model: Any, words: Sequence[str], tokenizer: Any, *, suffix: str | None, name: str) -> None:
    """Set the weights of a classifier's head from label words.

    Args:
        model: a transformers classifier with C classes, on the CPU; changed in place.
        words: C words, or descriptions for an encoder.
        tokenizer: the model's.
        suffix: what follows every text.
        name: the folder or hub name of its checkpoint.

    Raises:
        InvalidArgument: a word is not one token of a decoder, two words are the same to the model, or the head or the
            checkpoint has no layer for this.
    """
    if is_decoder(model):
        layer, weight_CD = model.score, _output_embeddings(model, word_tokens(tokenizer, words, suffix), name)
    else:
        layer = _last_layer(model)
        weight_CD = _prototypes(_states(model, layer, tokenizer(list(words), padding=True, return_tensors="pt")), words)
    weight_CD = _centred(weight_CD)
    if layer.weight.shape != weight_CD.shape:
        shape = tuple(layer.weight.shape)
        told = f"the words give weights of shape {tuple(weight_CD.shape)}, but the head's have {shape}; leave it out"
        refuse(WORDS_FLAG, HIDDEN, told)
    empty_D = _states(model, layer, _empty(tokenizer, suffix))[0]
    lean_C = weight_CD @ empty_D
    if layer.bias is None:
        weight_CD = weight_CD - torch.outer(lean_C, empty_D) / empty_D.square().sum()
    else:
        layer.bias.copy_(-lean_C)
    layer.weight.copy_(weight_CD)


def describe_head(words: Sequence[str], class_names: Sequence[str], *, decoder: bool) -> str:
    """A printable line: what the head starts from."""
    what = "output embeddings" if decoder else "encoded descriptions"
    pairs = [f"{name}: {word}" for name, word in zip(class_names, words, strict=True)]
    return f"head starts from       {what} ({'; '.join(pairs)})"


def word_tokens(tokenizer: Any, words: Sequence[str], suffix: str | None) -> list[int]:
    """The token of each label word where it would follow a text and the suffix.

    A space stands before the word, unless the suffix ends with white space.

    Raises:
        InvalidArgument: a word is not one token, or is unknown, or two words have the same token.
    """
    before = _TEXT + (suffix or "")
    gap = "" if before[-1:].isspace() else " "
    found: list[int] = []
    for word in words:
        tokens = _tokens_after(tokenizer, before, gap + word.strip())
        if tokens is None:
            refuse(SUFFIX_FLAG, suffix, f"its end and {word} become one token; let it end with a letter or a colon")
        if len(tokens) != 1:
            refuse(WORDS_FLAG, word, f"is {len(tokens)} tokens for this model; give a word that is a single token")
        if tokens[0] == tokenizer.unk_token_id:
            refuse(WORDS_FLAG, word, "is not in this model's vocabulary; give another word")
        if tokens[0] in found:
            other = words[found.index(tokens[0])]
            refuse(WORDS_FLAG, word, f"is the same token as {other}; give each class its own word")
        found += tokens
    return found


def _tokens_after(tokenizer: Any, before: str, text: str) -> list[int] | None:
    """The tokens of a text behind another one; None if they begin within the other one."""
    first, whole = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (before, before + text))
    return whole[len(first) :] if whole[: len(first)] == first else None


def _output_embeddings(model: Any, tokens: Sequence[int], name: str) -> Tensor:
    """Rows [C, D] of the output layer that the checkpoint's language model has; the classifier has dropped it."""
    if model.config.get_text_config().tie_word_embeddings:
        return model.get_input_embeddings().weight[list(tokens)].float()
    try:
        whole, info = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
    except Exception as error:  # the hub, the file system and the parsers raise unrelated types
        refuse_to_load("output layer", name, error, remedy="leave --label_words out")
    weight: Tensor = whole.get_output_embeddings().weight
    if any(key in info["missing_keys"] for key, own in whole.named_parameters() if own is weight):
        refuse(WORDS_FLAG, HIDDEN, f"{name} has no output layer, which holds its words; leave it out")
    return weight[list(tokens)].float()


def _last_layer(model: Any) -> nn.Linear:
    """The linear layer of the head that makes the logits."""
    head = [part for name in head_modules(model) for part in model.get_submodule(name).modules()]
    last = next((part for part in reversed(head) if isinstance(part, nn.Linear)), None)
    if last is None or last.out_features != model.config.num_labels:
        refuse(WORDS_FLAG, HIDDEN, f"the head of {type(model).__name__} does not end with a linear layer; leave it out")
    return last


def _empty(tokenizer: Any, suffix: str | None) -> dict[str, Tensor]:
    """An empty text as training would read it, with the suffix."""
    last = suffix_tokens(tokenizer, suffix)
    nothing = LabelledTexts(([""],), np.zeros(1, dtype=np.int64))
    batch = tokenize_texts(nothing, tokenizer, len(last) + _ROOM, last).batch([0], tokenizer.pad_token_id)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _states(model: Any, layer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the layer gets [B, D] when the model reads B texts."""
    seen: list[Tensor] = []
    handle, training = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])), model.training
    try:
        class_logits(model.eval(), inputs)
    finally:
        model.train(training)
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        refuse(WORDS_FLAG, HIDDEN, f"{type(model).__name__} does not turn a text into one vector; leave it out")
    return seen[0].float()


def _prototypes(states_CD: Tensor, words: Sequence[str]) -> Tensor:
    """The states, scaled so that a description's own logit is above the others' mean by `_MARGIN` on average."""
    centred_CD = _centred(states_CD)
    if not centred_CD.norm() > _LEAST_SPREAD * states_CD.norm():
        refuse(WORDS_FLAG, words_listed(words), "the model can hardly tell them apart; give other descriptions")
    above = centred_CD.square().sum(1).mean() * len(words) / (len(words) - 1)
    return states_CD * (_MARGIN / above)


def _centred(rows_CD: Tensor) -> Tensor:
    return rows_CD - rows_CD.mean(0)
