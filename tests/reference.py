"""The slow oracle: one example at a time, unpadded, through plain autograd in float64. Nothing here uses the engine.

Adapters compute with operations of torch here, so that their own backward pass is not trusted either.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptune.lora import LoraAdapter, adapters

Example = tuple[list[int], list[int]]  # token ids, labels (-100 where they don't count), not shifted


def example_loss(model: nn.Module, example: Example) -> Tensor:
    """Mean negative log-likelihood of the example's own labelled tokens; 0 when there is none."""
    ids, labels = (torch.tensor([part]) for part in example)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    targets = labels[0, 1:]
    total = sum(
        (F.cross_entropy(logits[t], targets[t]) for t in range(len(targets)) if targets[t] != -100), logits.sum() * 0
    )
    return total / max(1, int((targets != -100).sum()))


def oracle(model: nn.Module) -> nn.Module:
    """A float64 copy of `model`, independent of later changes to the model and of the adapters' autograd function."""
    double = copy.deepcopy(model).double()
    for _, adapter in adapters(double):
        adapter.forward = partial(adapter_output, adapter)  # type: ignore[method-assign]
    return double


def adapter_output(adapter: LoraAdapter, x: Tensor) -> Tensor:
    """An adapter's output by ordinary operations."""
    return adapter.B(adapter.A(adapter.dropout(x.to(adapter.A.weight.dtype)))) * (adapter.alpha / adapter.rank)


def example_gradients(model: nn.Module, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
    """One {parameter: gradient} per example, in float64."""
    double = oracle(model)
    trained = {name: parameter for name, parameter in double.named_parameters() if parameter.requires_grad}
    found = []
    for example in examples:
        grads = torch.autograd.grad(example_loss(double, example), list(trained.values()), allow_unused=True)
        found.append(
            {
                name: torch.zeros_like(parameter) if grad is None else grad
                for (name, parameter), grad in zip(trained.items(), grads, strict=True)
            }
        )
    return found


def flat(grads: dict[str, Tensor]) -> Tensor:
    """One example's gradient of all parameters in one vector."""
    return torch.cat([grad.flatten().double() for grad in grads.values()])


def clipped_sum(gradients: Sequence[dict[str, Tensor]], clip_norm: float, size: int) -> Tensor:
    """Sum over examples of g * min(1, C / |g|), flat."""
    total = torch.zeros(size, dtype=torch.float64)
    for grads in gradients:
        vector = flat(grads)
        norm = vector.norm().item()
        total += vector if norm <= clip_norm else vector * (clip_norm / norm)
    return total
