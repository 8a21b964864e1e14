"""How fast a new classification head should learn: by the size of what it reads, which differs a hundredfold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune.integrations.peft import class_logits
from utils.finetune_modes import head_modules

_ROWS, _TOKENS = 8, 16


@torch.no_grad()
def measure_head_rate(model: Any) -> float:
    """The learning rate at which one step of Adam moves a logit by about one.

    Adam moves each weight by the rate r, so a linear layer's output by up to r times the summed magnitudes of its
    input. These are measured on tokens drawn at random, so nothing of the training data is in the rate.

    Args:
        model: a classifier of the transformers library, before it is put into a mode; not changed.

    Returns:
        1 / (mean over rows of sum |x|) for the linear layer of the head with the largest inputs x, to one significant
        digit, so that rounding on another machine does not change it.

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
        refuse("--head_learning_rate", None, f"give one: {type(model).__name__}'s head has no linear layer to measure")
    return float(f"{1 / max(sizes):.0e}")


def _random_rows(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (_ROWS, _TOKENS), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
