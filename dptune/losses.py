"""One loss an example: the mean negative log-likelihood of its own answer tokens.

The losses that models return average over all tokens of the micro-batch, which couples an example to its neighbours
and voids the bound; so nothing here divides by anything but an example's own number of tokens. Logits are computed
only where a label counts, in chunks, and never kept: with 50,000 words they would outweigh everything else in memory.

Shapes: B examples, T tokens, D hidden size, V vocabulary, N tokens that carry a label, S most labelled tokens of one
example.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dptune.sharding import as_forward

IGNORE = -100  # the label of a token that does not count
_CHUNK_LOGITS = 1 << 24  # logits made at a time: 64 MB in float32


class CausalLMLoss:
    """(input_ids [B, T], labels [B, T]) -> losses [B] of a causal language model.

    `labels[b, t]` is the id of token t, or -100 where it does not count; the shift by one happens here. Rows are
    padded on the right: under causal attention padding is never seen by a real token, so there is no attention mask.
    An example without any label has loss and gradient exactly zero.

    Args:
        model: a model of the transformers library's shape: `base_model`, `get_output_embeddings()`, `logits`. A model
        that
            does anything after its output layer (soft caps, scaling) is noticed and run whole.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._through_head = as_forward(model, self._losses_through_head) if _head_is_last(model) else None

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if self._through_head is not None:
            return self._through_head(input_ids, labels)
        targets, counts = labels[:, 1:], labels[:, 1:].ne(IGNORE).sum(1)
        logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        return _row_sums(logits, targets) / counts.clamp_min(1)

    def _losses_through_head(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The same from the backbone's last hidden states: logits only where a token is labelled, in chunks."""
        targets, counts = labels[:, 1:], labels[:, 1:].ne(IGNORE).sum(1)
        hidden_BTD = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        head = self.model.get_output_embeddings()
        if _is_frozen_linear(head) or (type(head) is nn.Linear and not torch.is_grad_enabled()):
            rows = targets.ne(IGNORE)
            nll_N = _FrozenHeadNLL.apply(hidden_BTD[rows], head.weight, head.bias, targets[rows])  # type: ignore[no-untyped-call]
            sums = torch.zeros(len(labels), dtype=nll_N.dtype, device=nll_N.device)
            sums = sums.index_add(0, rows.nonzero()[:, 0], nll_N)
        elif type(head) is nn.Linear:
            hidden_BSD, targets_BS = _labelled_first(hidden_BTD, targets)
            sums = _RowNLL.apply(head(hidden_BSD), targets_BS)  # type: ignore[no-untyped-call]
        else:
            sums = _adapted_head_sums(head, hidden_BTD, targets)
        return sums / counts.clamp_min(1)


def _is_frozen_linear(head: nn.Module) -> bool:
    """While per-example gradients are recorded no weight needs a gradient: then a trained layer is one with a hook."""
    return type(head) is nn.Linear and not head.weight.requires_grad and not head._forward_hooks


@torch.no_grad()
def _head_is_last(model: Any) -> bool:
    """Whether `model(...)` is its output layer applied to its backbone's last hidden state, tried on a few tokens."""
    head = model.get_output_embeddings()
    if not hasattr(head, "weight") or model.base_model is model:
        return False

    def parts(ids: Tensor) -> Tensor:
        logits: Tensor = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return logits

    # Not token 0: where it pads, its embedding is zero, and logits of zero are the same under any cap or scale.
    tried = torch.linspace(1, len(head.weight) - 1, 8, device=next(chain(model.buffers(), model.parameters())).device)
    ids = tried.long()[None]
    was_training = model.training
    model.eval()
    whole = model(input_ids=ids, use_cache=False).logits
    same = torch.equal(whole, as_forward(model, parts)(ids))
    model.train(was_training)
    return bool(whole.any()) and same


def _row_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of negative log-likelihoods of each row's labelled tokens, [B]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    nll = F.cross_entropy(logits.to(dtype).transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    return nll.sum(1)


def _labelled_first(hidden_BTD: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden [B, S, D], targets [B, S]): each example's labelled positions first, in order; the rest is ignored."""
    longest = int(targets.ne(IGNORE).sum(1).max())
    order_BS = targets.eq(IGNORE).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(longest, 1)]
    hidden_BSD = hidden_BTD.gather(1, order_BS[..., None].expand(-1, -1, hidden_BTD.shape[-1]))
    return hidden_BSD, targets.gather(1, order_BS)


def _adapted_head_sums(head: Any, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
    """Row sums through an output layer with an adapter: rows keep their example, for its per-example gradient."""
    hidden_BSD, targets_BS = _labelled_first(hidden_BTD, targets)
    columns = max(1, _CHUNK_LOGITS // (head.weight.shape[0] * len(targets)))
    sums = hidden_BSD.new_zeros(len(targets), dtype=torch.promote_types(hidden_BSD.dtype, torch.float32))
    for start in range(0, max(targets_BS.shape[1], 1), columns):  # rows of one token too need a graph for backward
        part = slice(start, start + columns)
        sums = sums + checkpoint(
            lambda hidden, targets: _row_sums(head(hidden), targets),
            hidden_BSD[:, part],
            targets_BS[:, part],
            use_reentrant=False,
        )
    return sums


class _RowNLL(torch.autograd.Function):
    """(logits [B, S, V], targets [B, S]) -> sums of negative log-likelihoods [B], of labelled tokens.

    For an output layer that trains as a whole. Its gradient needs the logits' gradient, so that is kept, but nothing
    else of their size: it is written where the logits were. They must be used by nobody else.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows_NV, targets_N = logits.detach().flatten(0, 1), targets.flatten()
        dtype = torch.promote_types(logits.dtype, torch.float32)
        nll_N = rows_NV.new_empty(len(rows_NV), dtype=dtype)
        rows = max(1, _CHUNK_LOGITS // rows_NV.shape[1])
        for start in range(0, len(rows_NV), rows):
            part = slice(start, start + rows)
            values, labelled = rows_NV[part].to(dtype), targets_N[part].ne(IGNORE)
            logsumexp_n = values.logsumexp(1)
            own_n = targets_N[part].where(labelled, 0)[:, None]
            nll_N[part] = (logsumexp_n - values.gather(1, own_n)[:, 0]).where(labelled, 0)
            values = values.sub_(logsumexp_n[:, None]).exp_()
            values.scatter_add_(1, own_n, values.new_full(own_n.shape, -1.0))
            rows_NV[part] = values.mul_(labelled[:, None])
        ctx.grad = logits.detach()
        return nll_N.view_as(targets).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BSV, ctx.grad = ctx.grad, None
        if grad_BSV is None:
            raise RuntimeError("a second backward pass through the same losses: compute them anew")
        return grad_BSV.mul_(grads[0][:, None, None].to(grad_BSV.dtype)), None


class _FrozenHeadNLL(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], bias [V] or None, targets [N]) -> negative log-likelihoods [N].

    The gradient with respect to the hidden rows is made while a chunk's logits are at hand, so the logits are neither
    kept nor made twice: the arithmetic of an ordinary step, at the memory of one chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        nll_N = hidden_ND.new_empty(len(hidden_ND), dtype=dtype)
        wants_grad = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
        rows = max(1, _CHUNK_LOGITS // len(weight_VD))
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            logits_nV = F.linear(hidden_ND[part], weight_VD, bias_V).to(dtype)
            logsumexp_n = logits_nV.logsumexp(1)
            own_n = targets_N[part, None]
            nll_N[part] = logsumexp_n - logits_nV.gather(1, own_n)[:, 0]
            if grad_ND is not None:
                probabilities = logits_nV.sub_(logsumexp_n[:, None]).exp_()
                probabilities.scatter_add_(1, own_n, probabilities.new_full(own_n.shape, -1.0))
                grad_ND[part] = probabilities.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_ND)
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0][:, None].to(grad_ND.dtype), None, None, None
