"""Checks the recorded gradients of a model against autograd on a few examples, before training begins.

A rule only sees the input and output of one layer. It would be silently wrong for a model that also uses a weight
elsewhere (`F.linear(x, embedding.weight)`), or that puts tokens where examples belong. It would also be wrong if an
example's gradient depended on the rest of the micro-batch. The padding that a longer neighbour causes may change it
(attention without a mask, position embeddings that change with the longest row), or the neighbour itself. A model may
also keep what it saw in a buffer or a frozen weight, which would be released without noise.

Every front door checks with `require_separate_rows`, on random rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dptune._validate import HIDDEN, Described, refuse
from dptune.per_example.coverage import in_one_line, require_reached
from dptune.per_example.fixed_values import FixedValues, every, in_mode
from dptune.per_example.hooks import PerExampleGradients
from dptune.per_example.random_rows import RandomRow, neighbouring_lengths
from dptune.per_example.recorded import Recorded
from dptune.randomness import fixed_randomness
from dptune.sharding import are_sharded, compute_device, local_part, mesh_of, norms_over_ranks, own_rows, reshard

# Tolerated error relative to the parameter's own norm, and to the norm of the whole gradient. In lower precision,
# rounding depends on the shape of the batch: in bfloat16, a row's gradient alone and next to another row differed by
# 0.17 of its norm (30 layers).
_TOLERATED = {torch.float32: (1e-2, 1e-5), torch.float64: (1e-2, 1e-5)}
_TOLERATED_OF_LESS = (0.5, 0.2)
_SAME_LOSS = 2e-3  # tolerance for a row's loss in batches of the same shape
_OTHER_NEIGHBOURS = 4  # one alone may change the loss by less than the tolerance, by chance

BatchOf = Callable[[Sequence[RandomRow]], Sequence[Any]]  # rows -> arguments of the losses, padded as in training


def require_exact_gradients(
    model: nn.Module,
    losses: Callable[..., Tensor],
    *batch: Any,
    alone: Callable[[int], Sequence[Any]] | None = None,
    examples: int | None = None,
) -> None:
    """Compare per-example norms and a weighted sum of per-example gradients with autograd's, without dropout.

    A forward pass in training mode is tried as well. No buffer and no parameter may change in any of them.

    Args:
        model: the model whose trainable parameters are compared.
        losses: (*batch) -> losses [B].
        batch: tensors of B examples, such as token ids and labels [B, T] of random tokens, with T different from B.
        alone: index of an example -> the arguments of `losses` for that example alone, without the padding that
            `batch` adds; by default its rows of `batch`.
        examples: number of examples, if each has several neighbouring losses; by default B.

    Raises:
        InvalidArgument: norms or sums differ, a trained parameter has none, or a buffer or parameter changes (the
            message names it). Or the model cannot be recorded, or there is not one loss per example.
    """
    _compared_with_autograd(model, losses, batch, alone, examples)


@in_one_line
def _compared_with_autograd(
    model: nn.Module,
    losses: Callable[..., Tensor],
    batch: Sequence[Any],
    alone: Callable[[int], Sequence[Any]] | None,
    examples: int | None,
) -> dict[bool, Tensor]:
    """See `require_exact_gradients`. Returns {training mode: losses of the whole batch} under fixed randomness."""
    fixed = FixedValues(model, every)
    with _evaluating(model):
        with PerExampleGradients(model) as recorder:
            norms, sums, each = _recorded(recorder, losses(*batch), examples)
            require_reached(recorder.parameters, norms)
            count = len(each)
        parameters, tolerated = recorder.parameters, _tolerated(model)
        evaluated = _losses_in_mode(model, losses, batch, training=False)
        per_example = evaluated.unflatten(0, (count, -1)).sum(1)
        weighted = (per_example * torch.arange(1, count + 1, device=per_example.device)).sum()
        wanted = _gradients(model, parameters, weighted)
        mesh = mesh_of(parameters.values())
        reason = "the model uses it in a way that no rule sees (freeze it)"
        _compare(sums, wanted, tolerated, reason, mesh=mesh)
        for index in range(count):
            one = [part[index : index + 1] for part in batch] if alone is None else alone(index)
            wanted = _gradients(model, parameters, losses(*one).sum())
            reason = "an example's gradient depends on its padding or on its neighbours"
            _compare(each[index], wanted, tolerated, reason, mesh=mesh)
            found = {name: norms[name][index] for name in norms}
            lengths = dict(zip(wanted, _norms(wanted.values(), mesh=mesh), strict=True))
            _compare(found, {name: lengths[name] for name in norms}, tolerated, reason, mesh=None)
    trained = _losses_in_mode(model, losses, batch, training=True)
    fixed.require_unchanged()
    return {False: evaluated.detach(), True: trained}


def require_separate_rows(model: nn.Module, losses: Callable[..., Tensor], batch_of: BatchOf, *, longest: int) -> None:
    """Refuse a model whose gradients the engine gets wrong, or whose rows reach each other in a batch.

    Two random rows run together, padded, and each alone. They are of several lengths: see `neighbouring_lengths`. Then
    the shorter row runs beside other rows of the same length: its loss must not change, in any precision.

    Args:
        model: what is trained.
        losses: (*arguments) -> losses [B]; for two rows, the first half belongs to the first one.
        batch_of: random rows -> arguments of `losses`, padded as in training.
        longest: tokens of the longest row that there may be. It must be public, not measured on the data.

    Raises:
        InvalidArgument: see `require_exact_gradients`; or the loss of a row changes, or rows share random numbers.
    """
    _refuse_shared_randomness(model)
    for lengths in neighbouring_lengths(model, longest):
        rows = [RandomRow(length, number) for number, length in enumerate(lengths)]

        def alone(row: int, rows: Sequence[RandomRow] = tuple(rows)) -> Sequence[Any]:
            return batch_of([rows[row]])

        found = _compared_with_autograd(model, losses, batch_of(rows), alone, len(rows))
        _require_same_loss(model, losses, batch_of, rows, found)


@in_one_line
def require_precision(
    model: nn.Module,
    losses: Callable[..., Tensor],
    lower: Callable[..., Tensor],
    batch_of: BatchOf,
    *,
    longest: int,
    scale: float,
) -> None:
    """Refuse a model whose gradients overflow or vanish in the lower precision that it trains in.

    Two random rows run in both precisions. An example that overflows adds nothing in training. If all do, the whole
    budget is spent on noise.

    Args:
        model: what is trained.
        losses: (*arguments) -> losses [B], in the precision of the weights.
        lower: the same losses as training computes them.
        batch_of: random rows -> arguments of the losses.
        longest: see `require_separate_rows`.
        scale: the loss scale of training.

    Raises:
        InvalidArgument: a parameter's gradients are far from those in the precision of the weights.
    """
    rows = [RandomRow(length, number) for number, length in enumerate(neighbouring_lengths(model, longest)[0])]
    batch, weights = batch_of(rows), torch.arange(1, 1 + len(rows), device=compute_device(model))
    with _evaluating(model), PerExampleGradients(model) as recorder:
        mesh = mesh_of(recorder.parameters.values())
        exact = _weighted_sums(recorder, _backward(recorder, losses(*batch), len(rows)), weights)
        found = _weighted_sums(recorder, _backward(recorder, lower(*batch) * scale, len(rows)), weights / scale)
    if (far := _first_far(found, exact, _TOLERATED_OF_LESS, mesh=mesh)) is not None:
        refuse(
            far[0], HIDDEN, f"its gradients overflow or vanish in lower precision ({far[1]}); compute in a higher one"
        )


def _require_same_loss(
    model: nn.Module,
    losses: Callable[..., Tensor],
    batch_of: BatchOf,
    rows: Sequence[RandomRow],
    found: Mapping[bool, Tensor],
) -> None:
    """Refuse a model in which the loss of the first of two rows changes with the tokens of the second one.

    In training mode as well, with the same dropout masks each time: some layers use their batch's mean only there.

    Args:
        found: {training mode: losses of the two rows together}.
    """
    first, second = rows
    for training in (False, True):
        one = _of_first(found[training])
        for tried in range(1, 1 + _OTHER_NEIGHBOURS):
            batch = batch_of([first, second._replace(number=second.number + tried)])
            other = _of_first(_losses_in_mode(model, losses, batch, training=training))
            if not abs(one - other) <= _SAME_LOSS * (1 + abs(one)):
                mode = "in training mode " if training else ""
                reason = f"a row's loss {mode}is {one:g} or {other:g}, depending on its padding and on other rows"
                remedy = "so privacy would not hold; use one that masks padding and normalises each row by itself"
                refuse("model", Described(type(model).__name__), f"{reason}, {remedy}")


def _of_first(losses: Tensor) -> float:
    """The loss of the first of two examples."""
    return float(losses.detach().unflatten(0, (2, -1)).sum(1)[0])


def _losses_in_mode(model: nn.Module, losses: Callable[..., Tensor], batch: Sequence[Any], *, training: bool) -> Tensor:
    """The losses under random numbers that are the same each time; their state stays as it was.

    Those of evaluation mode have gradients, which one of them needs: without them, kernels may be others.
    """
    mode = in_mode(model, training=True) if training else _evaluating(model)
    with mode, torch.set_grad_enabled(not training), fixed_randomness(compute_device(model)):
        return losses(*batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but layers that recompute their activations in training do so here: else the check would need
    more memory than training. A layer that drops values itself does not, because it would drop them here too."""
    with in_mode(model, training=False):
        recomputing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in recomputing:
            if not _drops(module) and not any(
                inner in recomputing for inner in module.modules() if inner is not module
            ):
                module.training = True
        yield


def _drops(module: nn.Module) -> bool:
    """Whether the module itself, not one inside it, has a probability of dropping values."""
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def _refuse_shared_randomness(model: nn.Module) -> None:
    """Refuse layers that are skipped at random, once for all rows of a micro-batch."""
    for name, module in model.named_modules():
        probability = getattr(module, "layerdrop", 0.0)
        if isinstance(probability, float) and probability > 0:
            reason = "one random number skips a layer for all rows of a micro-batch, so they share it"
            refuse(f"{name}.layerdrop".removeprefix("."), probability, f"{reason}; set it to 0 in the model's config")


def _recorded(
    recorder: PerExampleGradients, losses: Tensor, examples: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """(norms [B], sum of the per-example gradients with weights 1 to B, each example's alone), each by parameter.

    All from one backward pass. An example may have several losses: see `examples` of `require_exact_gradients`.
    """
    recorded = _backward(recorder, losses, examples)
    norms = {name: squared.sqrt() for name, squared in recorded.squared_norms().items()}
    if not norms:
        refuse("model", HIDDEN, "the losses do not depend on any trained parameter")
    count = len(next(iter(norms.values())))

    def weighted(weights: Tensor) -> dict[str, Tensor]:
        return _weighted_sums(recorder, recorded.copied(), weights.to(losses.device))

    return norms, weighted(torch.arange(1, count + 1)), [weighted(row) for row in torch.eye(count)]


def _backward(recorder: PerExampleGradients, losses: Tensor, examples: int | None) -> Recorded:
    """The recorded gradients of a backward pass, by example."""
    if losses.ndim != 1:
        remedy = "give one loss per example, [B]; a mean over the micro-batch couples examples and voids the bound"
        refuse("losses.shape", tuple(losses.shape), f"{remedy} (dptune.CausalLMLoss gives them)")
    if examples is not None and (len(losses) % examples or not len(losses)):
        refuse("losses.shape", tuple(losses.shape), f"give the same number of losses for each of {examples} examples")
    if losses.requires_grad:  # else no layer that is recorded was run
        losses.sum().backward()
    return recorder.take().folded(1 if examples is None else len(losses) // examples)


def _weighted_sums(recorder: PerExampleGradients, recorded: Recorded, weights_B: Tensor) -> dict[str, Tensor]:
    """{parameter: this rank's part of the weighted sum}; consumes what was recorded."""
    parameters, weights_B = recorder.parameters, weights_B.to(torch.float64)
    if are_sharded(parameters.values()):
        return _shards_of_sums(parameters, recorded, weights_B)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    recorded.add_weighted_sums(sums, dict.fromkeys(parameters, weights_B))
    return sums


def _shards_of_sums(parameters: Mapping[str, nn.Parameter], recorded: Recorded, weights_B: Tensor) -> dict[str, Tensor]:
    """This rank's rows of the weighted sums. One whole parameter at a time is in memory."""
    found = {}
    for name, parameter in parameters.items():
        whole = torch.zeros(parameter.shape, dtype=parameter.dtype, device=weights_B.device)
        recorded.taken(name).add_weighted_sums({name: whole}, {name: weights_B})
        found[name] = own_rows(whole, parameter)
    return found


def _gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    """Autograd's gradients, {parameter: this rank's part}. All ranks have one loss, so FSDP's mean is each rank's."""
    grads: Sequence[Tensor | None]
    if are_sharded(parameters.values()):
        loss.backward()
        reshard(model)
        grads = [parameter.grad for parameter in parameters.values()]
        for parameter in parameters.values():
            parameter.grad = None
    else:
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: local_part(torch.zeros_like(parameter) if grad is None else grad)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }


def _tolerated(model: nn.Module) -> tuple[float, float]:
    """Tolerances for the lowest precision of the model's parameters; quantised (integer) ones count as the lowest."""
    return max(_TOLERATED.get(parameter.dtype, _TOLERATED_OF_LESS) for parameter in model.parameters())


def _norms(values: Iterable[Tensor], *, mesh: DeviceMesh | None) -> Tensor:
    """Norms of tensors, float64 [n], the same on every rank. With a mesh, each rank holds a part of each tensor."""
    norms = torch.stack([value.double().norm() for value in values])
    return norms if mesh is None else norms_over_ranks(norms, mesh)


def _compare(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    tolerated: tuple[float, float],
    reason: str,
    *,
    mesh: DeviceMesh | None,
) -> None:
    """Refuse gradients, or their norms, that differ from autograd's. Every rank refuses, or none."""
    if (far := _first_far(found, wanted, tolerated, mesh=mesh)) is not None:
        wrong = f"its per-example gradients differ from autograd's ({far[1]})"
        refuse(far[0], HIDDEN, f"{wrong}: {reason}, or its losses couple examples")


def _first_far(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    tolerated: tuple[float, float],
    *,
    mesh: DeviceMesh | None,
) -> tuple[str, str] | None:
    """(name, how far) of the first tensor that is not near the wanted one, the same on every rank."""
    errors = _norms((found[name] - values for name, values in wanted.items()), mesh=mesh)
    sizes = _norms(wanted.values(), mesh=mesh)
    whole = sizes.norm()
    for name, error, own in zip(wanted, errors, sizes, strict=True):
        if not error <= tolerated[0] * own + tolerated[1] * whole:
            return name, f"off by {error / whole:.1e} of the whole gradient"
    return None
