"""One loss per example: the mean negative log-likelihood of its own answer tokens.

Models return losses that average over all tokens of the micro-batch. This couples examples and voids the privacy bound,
so each loss here is divided only by its own example's number of tokens. Logits are computed only where a label counts,
in chunks, and never kept: with a vocabulary of 50,000 they would take more memory than everything else.

Rounding may depend on the shape of a kernel's inputs, so no shape may depend on the labels of other rows. If a
micro-batch has several rows, chunks of labelled tokens are filled up to a fixed size.

Shapes: B examples, T tokens, D hidden size, V vocabulary, N tokens with a label, S maximum number of labelled tokens
per example.
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

    `labels[b, t]` is the id of token t, or -100 if it does not count; this class shifts them by one. Rows are padded
    on the right. With causal attention, no real token sees that padding, so there is no attention mask. An example
    without labels has a loss and a gradient of exactly zero. Losses are in nats.

    Args:
        model: a model with the interface of the transformers library: `base_model`, `get_output_embeddings()`,
            `logits`. A model that does anything after its output layer (soft caps, scaling) is detected and run whole.
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
        """The same losses from the backbone's last hidden states, with logits only at labelled tokens, in chunks."""
        targets, counts = labels[:, 1:], labels[:, 1:].ne(IGNORE).sum(1)
        # Without gaps in memory all tokens take one product; with gaps each example takes its own, a fifth slower.
        hidden_BTD = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1].contiguous()
        head = self.model.get_output_embeddings()
        if _is_frozen_linear(head) or (type(head) is nn.Linear and not torch.is_grad_enabled()):
            rows = targets.ne(IGNORE)
            size = _chunk_tokens(head.weight) if len(labels) > 1 else None
            nll_N = _FrozenHeadNLL.apply(hidden_BTD[rows], head.weight, head.bias, targets[rows], size)  # type: ignore[no-untyped-call]
            sums = torch.zeros(len(labels), dtype=nll_N.dtype, device=nll_N.device)
            sums = sums.index_add(0, rows.nonzero()[:, 0], nll_N)
        elif type(head) is nn.Linear:
            hidden_BSD, targets_BS = _labelled_first(hidden_BTD, targets)
            sums = _RowNLL.apply(head(hidden_BSD), targets_BS)  # type: ignore[no-untyped-call]
        else:
            sums = _adapted_head_sums(head, hidden_BTD, targets)
        return sums / counts.clamp_min(1)


def _is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is frozen. While gradients are recorded, no weight needs one; trained layers have hooks."""
    return type(head) is nn.Linear and not head.weight.requires_grad and not head._forward_hooks


@torch.no_grad()
def _head_is_last(model: Any) -> bool:
    """Whether `model(...)` equals its output layer on its backbone's last hidden state, tested on a few tokens."""
    head = model.get_output_embeddings()
    if not hasattr(head, "weight") or model.base_model is model:
        return False

    def parts(ids: Tensor) -> Tensor:
        logits: Tensor = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return logits

    # Not token 0: if it pads, its embedding is zero, and logits of zero are the same under any cap or scale.
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
    """(hidden [B, S, D], targets [B, S]): labelled positions of each example first, in order; the rest is ignored.

    S is T - 1 for several rows, and the number of labels for a single row.
    """
    if len(targets) > 1:
        return hidden_BTD, targets
    longest = int(targets.ne(IGNORE).sum(1).max())
    order_BS = targets.eq(IGNORE).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(longest, 1)]
    hidden_BSD = hidden_BTD.gather(1, order_BS[..., None].expand(-1, -1, hidden_BTD.shape[-1]))
    return hidden_BSD, targets.gather(1, order_BS)


def _adapted_head_sums(head: Any, hidden_BTD: Tensor, targets: Tensor) -> Tensor:
    """Row sums [B] through an output layer with an adapter. Rows stay apart, for their per-example gradients."""
    hidden_BSD, targets_BS = _labelled_first(hidden_BTD, targets)
    columns = max(1, _CHUNK_LOGITS // (head.weight.shape[0] * len(targets)))
    sums = hidden_BSD.new_zeros(len(targets), dtype=torch.promote_types(hidden_BSD.dtype, torch.float32))
    for start in range(0, max(targets_BS.shape[1], 1), columns):  # rows of a single token need a graph for backward too
        part = slice(start, start + columns)
        sums = sums + checkpoint(
            lambda hidden, targets: _row_sums(head(hidden), targets),
            hidden_BSD[:, part],
            targets_BS[:, part],
            use_reentrant=False,
        )
    return sums


class _RowNLL(torch.autograd.Function):
    """(logits [B, S, V], targets [B, S]) -> sums of negative log-likelihoods of the labelled tokens [B].

    For an output layer whose weight is trained. Its gradient needs the logits' gradient, which overwrites the logits to
    save memory. So no other code may use these logits.
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
            raise RuntimeError("a second backward pass through the same losses: compute the losses again")
        return grad_BSV.mul_(grads[0][:, None, None].to(grad_BSV.dtype)), None


class _FrozenHeadNLL(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], bias [V] or None, targets [N], size) -> negative log-likelihoods [N].

    Chunks have `size` tokens, and the last one is filled up with zeros; None for chunks as large as fit in memory.

    The gradient of the hidden rows is computed together with each chunk's logits, so logits are neither kept nor
    computed twice: the arithmetic of an ordinary step, with the memory of one chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, size: int | None
    ) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        nll_N = hidden_ND.new_empty(len(hidden_ND), dtype=dtype)
        wants_grad = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
        rows = size or max(1, _CHUNK_LOGITS // len(weight_VD))
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            chunk, own = _filled_up(hidden_ND[part], size), len(targets_N[part])
            logits_nV = F.linear(chunk, weight_VD, bias_V)[:own].to(dtype)
            logsumexp_n = logits_nV.logsumexp(1)
            own_n = targets_N[part, None]
            nll_N[part] = logsumexp_n - logits_nV.gather(1, own_n)[:, 0]
            if grad_ND is not None:
                probabilities = logits_nV.sub_(logsumexp_n[:, None]).exp_()
                probabilities.scatter_add_(1, own_n, probabilities.new_full(own_n.shape, -1.0))
                grad_ND[part] = (_filled_up(probabilities.to(weight_VD.dtype), size) @ weight_VD)[:own]
        ctx.save_for_backward(grad_ND)
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0][:, None].to(grad_ND.dtype), None, None, None, None


def _chunk_tokens(weight_VD: Tensor) -> int:
    """Tokens per chunk where several rows share it: few on a CPU, where filling up costs time."""
    return max(1, min(_CHUNK_LOGITS // len(weight_VD), 64 if weight_VD.device.type == "cpu" else 512))


def _filled_up(rows_ND: Tensor, size: int | None) -> Tensor:
    """The rows, with rows of zeros behind them up to `size`; as they are if it is None."""
    return rows_ND if size in (None, len(rows_ND)) else F.pad(rows_ND, (0, 0, 0, size - len(rows_ND)))
