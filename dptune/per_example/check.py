"""Whether the recorded gradients are a model's own: tried on a few examples against autograd, before training begins.

A rule sees one layer's input and output. A model that uses a weight elsewhere too (`F.linear(x, embedding.weight)`), or
that puts tokens where examples belong, would be wrong in silence; here it is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dptune._validate import InvalidArgument
from dptune.per_example.hooks import PerExampleGradients

_OF_ITS_OWN, _OF_THE_WHOLE = 1e-2, 1e-5  # tolerated error over a parameter's own norm, and over the whole gradient's


def require_exact_gradients(model: nn.Module, losses: Callable[..., Tensor], *batch: Tensor) -> None:
    """Compare per-example norms and a weighted sum of per-example gradients with autograd's, dropout off.

    Args:
        model: its trainable parameters are compared, in float32 or better.
        losses: (*batch) -> losses [B].
        batch: tensors of B examples, such as token ids and labels [B, T] of random tokens; T other than B.

    Raises:
        InvalidArgument: they differ, naming the parameter; or there is not one loss an example.
    """
    was_training = model.training
    model.eval()
    try:
        with PerExampleGradients(model) as recorder:
            batch_losses = losses(*batch)
            if batch_losses.ndim != 1:
                shape = tuple(batch_losses.shape)
                raise InvalidArgument(
                    f"losses of shape {shape}: give one loss an example, [B]; a mean over the micro-batch couples "
                    "examples and voids the bound (dptune.CausalLMLoss gives them)"
                )
            batch_losses.sum().backward()
            recorded = recorder.take()
            norms = {name: squared.sqrt() for name, squared in recorded.squared_norms().items()}
            if not norms:
                raise InvalidArgument("model: the losses do not depend on any trained parameter")
            examples = len(next(iter(norms.values())))
            weights = torch.arange(1, examples + 1, device=next(iter(norms.values())).device)
            sums = {name: torch.zeros_like(parameter) for name, parameter in recorder.parameters.items()}
            recorded.add_weighted_sums(sums, dict.fromkeys(norms, weights.double()))
        _compare(recorder.parameters, sums, _gradients(recorder.parameters, (losses(*batch) * weights).sum()))
        for index in range(examples):
            alone = _gradients(recorder.parameters, losses(*(part[index : index + 1] for part in batch)).sum())
            found = {name: norms[name][index] if name in norms else grad.new_zeros(()) for name, grad in alone.items()}
            _compare(recorder.parameters, found, {name: grad.norm() for name, grad in alone.items()})
    finally:
        model.train(was_training)


def _gradients(parameters: dict[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }


def _compare(parameters: dict[str, nn.Parameter], found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    whole = torch.stack([values.double().norm() for values in wanted.values()]).norm()
    for name in parameters:
        error, own = (found[name] - wanted[name]).double().norm(), wanted[name].double().norm()
        if not error <= _OF_ITS_OWN * own + _OF_THE_WHOLE * whole:
            raise InvalidArgument(
                f"{name}: its per-example gradients are not autograd's (off by {error / whole:.1e} of the whole "
                "gradient): the model uses it in a way that no rule sees (freeze it), or its losses couple examples"
            )
