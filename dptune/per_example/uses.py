"""What one layer contributed to one parameter's per-example gradients, and the two things that clipping asks of it: its
squared norms, and its weighted sum over the examples.

A matrix's gradient is a sum of outer products over tokens. `Outer` keeps the two factors, which book-keeping needs for
one weighted product after the norms are known (Bu et al. 2022, "Differentially private optimization on large model at
small cost"), and takes its norm from the factors' own products (Goodfellow 2015; Li et al. 2022, "Large language models
can be strong differentially private learners": ghost norms), or materialises, whichever is cheaper.

Shapes: B examples, T tokens, M rows and N columns of the parameter. All sums are in float32 or better whatever the
factors' dtype: in bfloat16 a norm can be 0.5% too small, and what it clips 0.5% too long.

Where an example's tokens cancel, its norm is a small difference of large products, and in float32 it may even come out
as 0: nothing would then be clipped. Such a norm is computed again in float64, and none is taken to be below a
4,096th of its terms' lengths, since their sum, made in float32, is not exact below that either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A materialised gradient of this many times the bytes of the two factors is still the better bargain: it costs the
# weighted product that an ordinary step needs anyway, ghost norms cost more than that when T is not small.
_WORTH = 2
_CAST_ELEMENTS = 1 << 24  # of a factor in lower precision, cast at a time: 64 MB
# How many squares are summed in float32 (error 2e-7) before float64 takes over. Summing 2 million of them in float32
# gave norms 3e-5 too small on a CPU, 20 million 1e-3: what is clipped by too small a norm is longer than the
# sensitivity says.
_BLOCK = 1 << 16
# Tokens that cancel: a squared norm below a 16th of what it would be if the tokens' gradients were as long as they are
# but perpendicular. In float64 the products of any factors that a model gives are exact enough.
_CANCELLED = 1 / 16
_SHORTEST = 2.0**-12  # of a norm, over the sum of its tokens' lengths


@dataclass(frozen=True)
class Outer:
    """Per-example gradients of a matrix [M, N], unmade: example b's is the sum over t of left[b, t] right[b, t]^T.

    Attributes:
        left: [B, T, M], or whole numbers [B, T] that stand for one-hot rows (an embedding's tokens).
        right: [B, T, N].
        rows: M.
    """

    left: Tensor
    right: Tensor
    rows: int

    @property
    def is_lookup(self) -> bool:
        return not self.left.is_floating_point()

    def worth_materialising(self) -> bool:
        """Whether the gradients [B, M, N] are cheaper to make and to keep than the factors and a ghost norm."""
        tokens, columns = self.right.shape[1:]
        return not self.is_lookup and self.rows * columns <= _WORTH * tokens * (self.rows + columns)

    def materialised(self) -> Tensor:
        """The gradients, [B, M, N]."""
        right = _exact(self.right)
        if not self.is_lookup:
            return torch.bmm(_exact(self.left).transpose(1, 2), right)
        examples, columns = len(right), right.shape[2]
        made = right.new_zeros(examples * self.rows, columns)
        first_rows = torch.arange(examples, device=right.device)[:, None] * self.rows
        made.index_add_(0, (self.left + first_rows).flatten(), right.reshape(-1, columns))
        return made.view(examples, self.rows, columns)

    def folded(self, rows_per_unit: int) -> Outer:
        """The same with every `rows_per_unit` neighbouring examples as one: their tokens, side by side."""
        left, right = (part.unflatten(0, (-1, rows_per_unit)).flatten(1, 2) for part in (self.left, self.right))
        return Outer(left, right, self.rows)

    def chosen(self, examples: Tensor) -> Outer:
        """Of some examples: a mask [B], or their numbers."""
        return Outer(self.left[examples], self.right[examples], self.rows)

    def exactly(self) -> Outer:
        """The same in float64."""
        return Outer(self.left if self.is_lookup else self.left.double(), self.right.double(), self.rows)

    def squared_norms(self) -> Tensor:
        """[B] float64, off by rounding that is small beside `lengths()` squared, but not beside themselves."""
        if self.is_lookup:
            return _lookup_squared_norms(self.left, _exact(self.right), self.rows)
        return torch.cat([_products(left, right) for left, right in self._parts()])

    def lengths(self) -> Tensor:
        """Sum over an example's tokens of the norms of their outer products, [B] float64: no norm is larger."""
        found = []
        for left, right in self._parts():
            of_tokens = torch.linalg.vector_norm(right, dim=2).double()
            if not self.is_lookup:
                of_tokens *= torch.linalg.vector_norm(left, dim=2)
            found.append(of_tokens.sum(1))
        return torch.cat(found)

    def inner_products(self, lookup: Outer) -> Tensor:
        """<this gradient, a lookup's gradient of the same matrix> of each example, [B] float64.

        A tied embedding's squared norm has it twice. Of the lookup only its rows matter: with s its tokens, it is the
        sum over t, s of left[t, token_s] <right_t, lookup_s>.
        """
        found = []
        for start, (left, right) in zip(self._starts(), self._parts(), strict=True):
            part = slice(start, start + len(left))
            ids, grads = lookup.left[part], _exact(lookup.right[part])
            at_tokens = left.gather(2, ids[:, None, :].expand(-1, left.shape[1], -1))
            found.append((at_tokens * torch.bmm(right, grads.transpose(1, 2))).sum((1, 2), dtype=torch.float64))
        return torch.cat(found)

    def adding_weighted_sum(self, total_MN: Tensor, weights_B: Tensor) -> Iterator[None]:
        """total_MN += sum over b of weights_B[b] times example b's gradient, by products, nothing of size B M N; yields
        after each of them, so that an error can be told from one before anything was added."""
        weights = weights_B.to(total_MN.dtype)
        for start, (left, right) in zip(self._starts(), self._parts(), strict=True):
            own = weights[start : start + len(left), None, None]
            if self.is_lookup:
                total_MN.index_add_(0, left.flatten(), (right * own).flatten(0, 1).to(total_MN.dtype))
            elif left.shape[2] <= right.shape[2]:
                total_MN.addmm_((left * own).flatten(0, 1).t(), right.flatten(0, 1))
            else:
                total_MN.addmm_(left.flatten(0, 1).t(), (right * own).flatten(0, 1))
            yield

    def _examples_at_once(self) -> int:
        factors = [self.right] if self.is_lookup else [self.left, self.right]
        if all(_exact_dtype(factor) == factor.dtype for factor in factors):
            return max(1, len(self.right))
        return max(1, _CAST_ELEMENTS // max(1, max(factor[0].numel() for factor in factors)))

    def _starts(self) -> range:
        return range(0, len(self.right), self._examples_at_once())

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(left, right) of a few examples at a time, in float32 or better (a lookup's numbers as they are)."""
        for start in self._starts():
            part = slice(start, start + self._examples_at_once())
            yield (self.left[part] if self.is_lookup else _exact(self.left[part])), _exact(self.right[part])


Use = Tensor | Outer  # per-example gradients [B, *shape], made or unmade


def joined_uses(uses: list[Use]) -> list[Use]:
    """The uses of one parameter by as few as possible: one tensor, or at most one ordinary and one lookup `Outer`."""
    outers = [use for use in uses if isinstance(use, Outer)]
    if len(outers) < len(uses):
        made = [use.materialised() if isinstance(use, Outer) else use for use in uses]
        return [sum(made[1:], start=made[0])]
    kinds = [[use for use in outers if use.is_lookup is lookup] for lookup in (False, True)]
    return [_concatenated(kind) for kind in kinds if kind]


def squared_norms(own: list[Use]) -> Tensor:
    """Of the per-example gradients of one parameter, of which `own` are all the uses, `joined_uses`; [B] float64."""
    outers = [use for use in own if isinstance(use, Outer)]
    if not outers:
        (made,) = (use for use in own if not isinstance(use, Outer))
        blocks = made.flatten(1).split(_BLOCK, dim=1)
        return torch.stack([torch.linalg.vector_norm(block, dim=1).double().square() for block in blocks]).sum(0)
    found = _of_factors(outers)
    lengths = torch.stack([use.lengths() for use in outers]).sum(0)
    tokens = sum(use.right.shape[1] for use in outers)
    cancelled = found * tokens < _CANCELLED * lengths.square()
    for example in cancelled.nonzero():
        found[example] = _of_factors([use.chosen(example).exactly() for use in outers])
    return found.maximum((_SHORTEST * lengths).square())


def _of_factors(outers: list[Outer]) -> Tensor:
    found = torch.stack([use.squared_norms() for use in outers]).sum(0)
    if len(outers) > 1:  # a tied embedding: as an output layer and as a lookup
        ordinary, lookup = outers
        found = found + 2 * ordinary.inner_products(lookup)
    return found


def _concatenated(outers: list[Outer]) -> Outer:
    if len(outers) == 1:
        return outers[0]
    left, right = (torch.cat([getattr(use, part) for use in outers], dim=1) for part in ("left", "right"))
    return Outer(left, right, outers[0].rows)


def _exact_dtype(factor: Tensor) -> torch.dtype:
    return torch.promote_types(factor.dtype, torch.float32)


def _exact(factor: Tensor) -> Tensor:
    return factor.to(_exact_dtype(factor))


def _products(left: Tensor, right: Tensor) -> Tensor:
    """sum over t, s of <left_t, left_s> <right_t, right_s>, [B] float64."""
    of_left = torch.bmm(left, left.transpose(1, 2))
    return of_left.mul_(torch.bmm(right, right.transpose(1, 2))).sum((1, 2), dtype=torch.float64)


def _lookup_squared_norms(ids_BT: Tensor, grads_BTN: Tensor, rows: int) -> Tensor:
    """Squared norms of gradients whose row v is the sum of grads[t] over the tokens t with ids[t] = v, [B] float64.

    Rows are summed before they are squared, as few as there are distinct tokens: nothing has the vocabulary's size.
    """
    first_rows = torch.arange(len(ids_BT), device=ids_BT.device)[:, None] * rows
    found: tuple[Tensor, Tensor] = (ids_BT + first_rows).flatten().unique(return_inverse=True)
    distinct, place = found
    sums = grads_BTN.new_zeros(len(distinct), grads_BTN.shape[2]).index_add_(0, place, grads_BTN.flatten(0, 1))
    of_rows: Tensor = torch.linalg.vector_norm(sums, dim=1).double().square()
    return of_rows.new_zeros(len(ids_BT)).index_add_(0, distinct // rows, of_rows)
