"""Defaults that follow from the model: learning rates of a new head and of a whole model, and the clip norm.

Their right scale differs a hundredfold between models. The head's rate and the clip norm are measured before training,
on random tokens, so they reveal nothing about the data.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptune._validate import refuse
from dptune.integrations.peft import class_logits
from dptune.mechanism import PrivacyConfig
from utils.classification.mode_defaults import ModelRates, plain_whole_rate
from utils.classification.modes import head_modules
from utils.training.chosen_defaults import private_rate_of, width_of
from utils.training.measured_clip_norm import just_above, typical

_ROWS, _TOKENS = 16, 16


def rates_of_model(model: Any, config: PrivacyConfig | None, optimizer: str) -> ModelRates:
    """The rates that follow from a model, which is only read.

    Args:
        model: a transformers classifier, before it is put into a mode.
        config: the mechanism; None without privacy.
        optimizer: name of the optimizer.
    """
    if config is None:
        whole = partial(plain_whole_rate, width_of(model.config))
    else:
        whole = partial(private_rate_of, model, config, optimizer, whole=True)
    return ModelRates(partial(measure_head_rate, model), whole)


@torch.no_grad()
def measure_head_rate(model: Any) -> float:
    """The learning rate at which one step of Adam moves a logit by about one.

    Adam moves each weight by the rate r. It moves a linear layer's output by up to r times the sum of its inputs'
    magnitudes.

    Args:
        model: a transformers classifier, before it is put into a mode; not changed.

    Returns:
        1 / (mean over rows of sum |x|) for the linear layer of the head with the largest inputs x. It has one
        significant digit, so that rounding on another machine does not change it.

    Raises:
        InvalidArgument: the head has no linear layer to measure.
    """
    sizes: list[float] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(float(inputs[0].float().abs().sum(dim=-1).mean()))

    head = [part for name in head_modules(model) for part in model.get_submodule(name).modules()]
    handles = [part.register_forward_pre_hook(note) for part in head if isinstance(part, nn.Linear)]
    training = model.training
    try:
        class_logits(model.eval(), _random_rows(model))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not sizes or max(sizes) == 0:
        refuse("--head_learning_rate", None, f"must be given: {type(model).__name__}'s head has no linear layer")
    return float(f"{1 / max(sizes):.0e}")


def measure_clip_norm(model: Any) -> float:
    """A clip norm just above the typical gradient norm of the model at the start.

    With a far smaller one the model may predict only the majority class.

    Args:
        model: as for `typical_gradient_norm`.

    Returns:
        See `just_above`.

    Raises:
        InvalidArgument: the gradients are zero or not finite.
    """
    return just_above(typical_gradient_norm(model), given=None)


def typical_gradient_norm(model: Any) -> float:
    """The median gradient norm of single random rows, with each class in turn; NaN if one is not finite.

    Args:
        model: a classifier in its mode, whose trained parameters require a gradient. Not changed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = _random_rows(model)
    training, norms = model.training, []
    model.eval()
    try:
        for row in range(_ROWS):
            logits = class_logits(model, {name: values[row : row + 1] for name, values in rows.items()})
            label = torch.tensor([row % logits.shape[1]], device=logits.device)
            gradients = torch.autograd.grad(F.cross_entropy(logits, label), trained, allow_unused=True)
            norms.append(math.sqrt(sum(float(one.double().square().sum()) for one in gradients if one is not None)))
    finally:
        model.train(training)
    return typical(norms)


def _random_rows(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (_ROWS, _TOKENS), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
