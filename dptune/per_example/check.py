"""Checks the recorded gradients of a model against autograd on a few examples, before training begins.

A rule only sees the input and output of one layer. It would be silently wrong for a model that also uses a weight
elsewhere (`F.linear(x, embedding.weight)`), or that puts tokens where examples belong. It would also be wrong for a
model in which an example's gradient depends on the rest of the micro-batch: on the padding that a longer neighbour
causes (attention without a mask, position embeddings that change with the longest row), or on the neighbour itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dptune._validate import HIDDEN, Described, refuse
from dptune.per_example.coverage import in_one_line, require_reached
from dptune.per_example.hooks import PerExampleGradients

# Tolerated error relative to the parameter's own norm, and to the norm of the whole gradient. In lower precision,
# rounding depends on the shape of the batch: in bfloat16, a row's gradient alone and next to another row differed by
# 0.17 of its norm (30 layers).
_TOLERATED = {torch.float32: (1e-2, 1e-5), torch.float64: (1e-2, 1e-5)}
_TOLERATED_OF_LESS = (0.5, 0.2)
_OTHER_PADDINGS = 4  # one alone may change the loss by less than the tolerance, by chance
_SAME_LOSS = 2e-3  # tolerance for a row's loss in batches of the same shape


@in_one_line
def require_exact_gradients(
    model: nn.Module,
    losses: Callable[..., Tensor],
    *batch: Tensor,
    alone: Callable[[int], Sequence[Tensor]] | None = None,
) -> None:
    """Compare per-example norms and a weighted sum of per-example gradients with autograd's, without dropout.

    Args:
        model: the model whose trainable parameters are compared.
        losses: (*batch) -> losses [B].
        batch: tensors of B examples, such as token ids and labels [B, T] of random tokens, with T different from B.
        alone: index of an example -> the tensors of that example alone, without the padding that `batch` adds; by
            default its rows of `batch`.

    Raises:
        InvalidArgument: they differ or a trained parameter has none (the message names it), the model cannot be
            recorded, or there is not one loss per example.
    """
    was_training = model.training
    model.eval()
    try:
        with PerExampleGradients(model) as recorder:
            norms, sums = _recorded(recorder, losses(*batch), lambda count: torch.arange(1.0, count + 1))
            require_reached(recorder.parameters, norms)
            count = len(next(iter(norms.values())))
            each = [_recorded(recorder, losses(*batch), partial(_only, index))[1] for index in range(count)]
        parameters, tolerated = recorder.parameters, _tolerated(model)
        batch_losses = losses(*batch)
        weights = torch.arange(1, count + 1, device=batch_losses.device)
        wanted = _gradients(parameters, (batch_losses * weights).sum())
        _compare(sums, wanted, tolerated, "the model uses it in a way that no rule sees (freeze it)")
        for index in range(count):
            one = [part[index : index + 1] for part in batch] if alone is None else alone(index)
            wanted = _gradients(parameters, losses(*one).sum())
            reason = "an example's gradient depends on its padding or on its neighbours"
            _compare(each[index], wanted, tolerated, reason)
            found = {name: norms[name][index] for name in norms}
            _compare(found, {name: wanted[name].norm() for name in norms}, tolerated, reason)
    finally:
        model.train(was_training)


def require_separate_rows(
    model: nn.Module, losses: Callable[..., Tensor], *rows: Tensor, lengths: Sequence[int], vocab_size: int
) -> None:
    """Refuse a model whose gradients the engine gets wrong, or whose rows reach each other in a batch.

    The rows run together, padded, and each alone, cut to its own length. Then the shortest row runs with other paddings
    and other neighbours of the same shape: its loss must not change, in any precision.

    Args:
        model: what is trained.
        losses: (*rows) -> losses [B].
        rows: tensors [B, T] or [B]; the first one holds random token ids.
        lengths: tokens of each row, B of them.
        vocab_size: number of token ids.

    Raises:
        InvalidArgument: see `require_exact_gradients`; or the loss of a row changes.
    """

    def alone(row: int) -> list[Tensor]:
        return [part[row : row + 1, : lengths[row]] if part.ndim == 2 else part[row : row + 1] for part in rows]

    require_exact_gradients(model, losses, *rows, alone=alone)
    ids, *others = rows
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    generator, batches = torch.Generator().manual_seed(1), [ids]
    for _ in range(_OTHER_PADDINGS):
        changed = torch.randint(1, vocab_size, ids.shape, generator=generator).to(ids.device)
        changed[shortest, : lengths[shortest]] = ids[shortest, : lengths[shortest]]
        batches.append(changed)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        one, *found = (losses(tokens, *others)[shortest].item() for tokens in batches)
    model.train(was_training)
    differing = [other for other in found if not abs(one - other) <= _SAME_LOSS * (1 + abs(one))]
    if differing:
        reason = f"a row's loss is {one:g} or {differing[0]:g}, by its padding and other rows"
        remedy = "so privacy would not hold; use one that masks padding"
        refuse("model", Described(type(model).__name__), f"{reason}, {remedy}")


def _recorded(
    recorder: PerExampleGradients, losses: Tensor, weights_of: Callable[[int], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(norms [B], weighted sum of the per-example gradients), each by parameter."""
    if losses.ndim != 1:
        remedy = "give one loss per example, [B]; a mean over the micro-batch couples examples and voids the bound"
        refuse("losses.shape", tuple(losses.shape), f"{remedy} (dptune.CausalLMLoss gives them)")
    if losses.requires_grad:  # else no layer that is recorded was run
        losses.sum().backward()
    recorded = recorder.take()
    norms = {name: squared.sqrt() for name, squared in recorded.squared_norms().items()}
    if not norms:
        refuse("model", HIDDEN, "the losses do not depend on any trained parameter")
    weights = weights_of(len(next(iter(norms.values())))).to(losses.device, torch.float64)
    sums = {name: torch.zeros_like(parameter) for name, parameter in recorder.parameters.items()}
    recorded.add_weighted_sums(sums, dict.fromkeys(norms, weights))
    return norms, sums


def _only(index: int, count: int) -> Tensor:
    return torch.arange(count).eq(index).double()


def _gradients(parameters: dict[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }


def _tolerated(model: nn.Module) -> tuple[float, float]:
    """Tolerances for the lowest precision of the model's parameters; quantised (integer) ones count as the lowest."""
    return max(_TOLERATED.get(parameter.dtype, _TOLERATED_OF_LESS) for parameter in model.parameters())


def _compare(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerated: tuple[float, float], reason: str) -> None:
    whole = torch.stack([values.double().norm() for values in wanted.values()]).norm()
    for name, values in wanted.items():
        error, own = (found[name] - values).double().norm(), values.double().norm()
        if not error <= tolerated[0] * own + tolerated[1] * whole:
            size = f"off by {error / whole:.1e} of the whole gradient"
            wrong = f"its per-example gradients differ from autograd's ({size})"
            refuse(name, HIDDEN, f"{wrong}: {reason}, or its losses couple examples")
