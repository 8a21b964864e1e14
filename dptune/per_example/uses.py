"""One layer's contribution to the per-example gradients of one parameter: its squared norms and its weighted sum.

A matrix's gradient is a sum of outer products over tokens. `Outer` keeps the two factors. After the norms are known,
they give the weighted sum in one product (book-keeping: Bu et al. 2022, "Differentially private optimization on large
model at small cost"). The norm comes from products of the factors (ghost norms: Goodfellow 2015; Li et al. 2022, "Large
language models can be strong differentially private learners") or from the gradient itself, whichever is cheaper.

Shapes: B examples, T tokens, M rows and N columns of the parameter. All sums are in float32 or better, whatever the
factors' dtype. In bfloat16 a norm can be 0.5% too small, and the clipped gradient is then 0.5% too long.

If an example's tokens cancel, its norm is a small difference of large products. In float32 it may even be 0, and then
the example would not be clipped. Such a norm is computed again in float64. In addition, no norm counts as less than a
4,096th of the sum of its tokens' lengths. Below that, the gradient's sum in float32 is not exact either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dptune.per_example.flat_gradients import squared_norms_of, without_rows

# A gradient is materialised up to this many times the size of its two factors. It costs about one weighted product,
# which an ordinary step needs anyway; ghost norms cost more unless T is small.
_WORTH = 2
# Elements of a weighted product at a time: 64 MB on an accelerator. On a CPU 4 MB, which its cache holds until they are
# added. That is a tenth faster than 64 MB.
_PRODUCT_ELEMENTS, _PRODUCT_ELEMENTS_CPU = 1 << 24, 1 << 20
_CAST_ELEMENTS = 1 << 24  # elements of a lower-precision factor that are cast at a time: 64 MB
# Tokens cancel if the squared norm is below a 16th of that of perpendicular token gradients with the same lengths. In
# float64, the products of any factors from a model are exact enough.
_CANCELLED = 1 / 16
# Arithmetic operations of a ghost norm from which half of its products are left out, which takes more calls. A call
# costs more on an accelerator.
_WORTH_HALVING, _WORTH_HALVING_CPU = 1 << 31, 1 << 28
_SHORTEST = 2.0**-12  # minimum norm, relative to the sum of its tokens' lengths


@dataclass(frozen=True)
class Outer:
    """Per-example gradients of a matrix [M, N] as factors: for example b, the sum over t of left[b, t] right[b, t]^T.

    Attributes:
        left: [B, T, M], or whole numbers [B, T] that stand for one-hot rows (the tokens of an embedding).
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
        """Whether the gradients [B, M, N] are cheaper than the factors and a ghost norm."""
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
        """The same with every `rows_per_unit` neighbouring examples joined into one, which has all their tokens."""
        left, right = (part.unflatten(0, (-1, rows_per_unit)).flatten(1, 2) for part in (self.left, self.right))
        return Outer(left, right, self.rows)

    def chosen(self, examples: Tensor) -> Outer:
        """The factors of some examples, given as a mask [B] or as indices."""
        return Outer(self.left[examples], self.right[examples], self.rows)

    def without(self, examples_B: Tensor) -> Outer:
        """The same with gradients of zero for some examples, given as a mask [B]."""
        left = self.left if self.is_lookup else without_rows(self.left, examples_B)
        return Outer(left, without_rows(self.right, examples_B), self.rows)

    def exactly(self) -> Outer:
        """The same in float64."""
        return Outer(self.left if self.is_lookup else self.left.double(), self.right.double(), self.rows)

    def squared_norms(self) -> Tensor:
        """[B] float64. The rounding error is small relative to `lengths()` squared, but maybe not to the norms."""
        if self.is_lookup:
            by = _by_distinct_rows if self.right.device.type == "cpu" else _by_equal_tokens
            return by(self.left, _exact(self.right), self.rows)
        return _joined([_products(left, right) for left, right in self._parts()])

    def lengths(self) -> Tensor:
        """Sum over an example's tokens of the norms of their outer products, [B] float64; no norm is larger."""
        found = []
        for left, right in self._parts():
            of_tokens = torch.linalg.vector_norm(right, dim=2).double()
            if not self.is_lookup:
                of_tokens *= torch.linalg.vector_norm(left, dim=2)
            found.append(of_tokens.sum(1))
        return _joined(found)

    def inner_products(self, lookup: Outer) -> Tensor:
        """<this gradient, a lookup's gradient of the same matrix> per example, [B] float64.

        The squared norm of a tied embedding contains it twice. With the lookup's tokens s, it is the sum over t, s of
        left[t, token_s] <right_t, lookup_s>.
        """
        found = []
        for start, (left, right) in zip(self._starts(), self._parts(), strict=True):
            part = slice(start, start + len(left))
            ids, grads = lookup.left[part], _exact(lookup.right[part])
            at_tokens = left.gather(2, ids[:, None, :].expand(-1, left.shape[1], -1))
            found.append((at_tokens * torch.bmm(right, grads.transpose(1, 2))).sum((1, 2), dtype=torch.float64))
        return _joined(found)

    def adding_weighted_sum(self, total_MN: Tensor, weights_B: Tensor) -> Iterator[None]:
        """total_MN += sum over b of weights_B[b] times example b's gradient, without a tensor of size B M N.

        Products are computed in the factors' precision, for some rows of the total at a time, and added in the total's.
        Yields after each of them, so that the caller knows whether an error came before anything was added.
        """
        for start, (left, right) in zip(self._starts(), self._parts(), strict=True):
            own = weights_B[start : start + len(right), None, None].to(right.dtype)
            if self.is_lookup:
                total_MN.index_add_(0, left.flatten(), (right * own).flatten(0, 1).to(total_MN.dtype))
                yield
                continue
            if left.shape[2] <= right.shape[2]:
                left = left * own
            else:
                right = right * own
            elements = _PRODUCT_ELEMENTS_CPU if right.device.type == "cpu" else _PRODUCT_ELEMENTS
            columns = right.flatten(0, 1)
            rows = -(-len(total_MN) // max(1, -(-total_MN.numel() // elements)))  # parts of equal size
            for part, total in zip(left.flatten(0, 1).split(rows, 1), total_MN.split(rows), strict=True):
                total += part.t() @ columns
                yield

    def _examples_at_once(self) -> int:
        factors = [self.right] if self.is_lookup else [self.left, self.right]
        if all(_exact_dtype(factor) == factor.dtype for factor in factors):
            return max(1, len(self.right))
        return max(1, _CAST_ELEMENTS // max(1, max(factor.shape[1:].numel() for factor in factors)))

    def _starts(self) -> range:
        return range(0, len(self.right), self._examples_at_once())

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(left, right) of a few examples at a time, in float32 or better (a lookup's numbers stay as they are)."""
        for start in self._starts():
            part = slice(start, start + self._examples_at_once())
            yield (self.left[part] if self.is_lookup else _exact(self.left[part])), _exact(self.right[part])


Use = Tensor | Outer  # per-example gradients [B, *shape], made or unmade


def joined_uses(uses: list[Use]) -> list[Use]:
    """The same sum with as few uses as possible: one tensor, or at most one ordinary and one lookup `Outer`."""
    outers = [use for use in uses if isinstance(use, Outer)]
    if len(outers) < len(uses):
        made = [use.materialised() if isinstance(use, Outer) else use for use in uses]
        return [sum(made[1:], start=made[0])]
    kinds = [[use for use in outers if use.is_lookup is lookup] for lookup in (False, True)]
    return [_concatenated(kind) for kind in kinds if kind]


def squared_norms(uses: Mapping[str, list[Use]]) -> dict[str, Tensor]:
    """{parameter: squared norms [B] float64} from all uses of each parameter after `joined_uses`.

    The host waits for the device once: to learn where tokens cancel.
    """
    outers = {name: [use for use in own if isinstance(use, Outer)] for name, own in uses.items()}
    outers = {name: own for name, own in outers.items() if own}
    made = {name: _made(own) for name, own in uses.items() if name not in outers}
    found = dict(zip(made, squared_norms_of(list(made.values())), strict=True))
    return found | dict(zip(outers, _norms_of_factors(list(outers.values())), strict=True))


def _made(own: list[Use]) -> Tensor:
    (made,) = (use for use in own if not isinstance(use, Outer))
    return made.flatten(1)


def _norms_of_factors(outers: list[list[Outer]]) -> list[Tensor]:
    """Squared norms [B] of each parameter from all its uses: in float64 where tokens cancel, and never too small."""
    if not outers:
        return []
    found_NB = torch.stack([_of_factors(own) for own in outers])
    lengths_NB = torch.stack([_added([use.lengths() for use in own]) for own in outers])
    for place, example in _cancelled(outers, found_NB, lengths_NB):
        exact = [use.chosen(example[None]).exactly() for use in outers[int(place)]]
        found_NB[place, example] = _of_factors(exact)[0]
    return list(found_NB.maximum((_SHORTEST * lengths_NB).square()))


def _cancelled(outers: list[list[Outer]], found_NB: Tensor, lengths_NB: Tensor) -> Tensor:
    """(place of the parameter, example) where tokens cancel, int64 [cases, 2]."""
    tokens = [sum(use.right.shape[1] for use in own) for own in outers]
    if len(set(tokens)) == 1:
        of_tokens = found_NB * tokens[0]
    else:  # each is a number of the host, which a copy to the device would have to wait for
        of_tokens = torch.stack([own * count for own, count in zip(found_NB, tokens, strict=True)])
    return (of_tokens < _CANCELLED * lengths_NB.square()).nonzero()


def _of_factors(outers: list[Outer]) -> Tensor:
    found = _added([use.squared_norms() for use in outers])
    if len(outers) > 1:  # a tied embedding: as an output layer and as a lookup
        ordinary, lookup = outers
        found = found + 2 * ordinary.inner_products(lookup)
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


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
    """sum over t, s of <left_t, left_s> <right_t, right_s>, [B] float64. Terms with s < t equal those with s > t."""
    examples, tokens = left.shape[:2]
    worth = _WORTH_HALVING_CPU if left.device.type == "cpu" else _WORTH_HALVING
    is_worth = 2 * examples * tokens**2 * (left.shape[2] + right.shape[2]) > worth
    size = max(64, tokens // 4) if is_worth else max(1, tokens)
    found = [left.new_zeros(examples, dtype=torch.float64)] if not tokens else []  # a dummy row of a single token
    for start in range(0, tokens, size):
        own, later = slice(start, start + size), slice(start, None)
        products = torch.bmm(left[:, own], left[:, later].transpose(1, 2))
        products.mul_(torch.bmm(right[:, own], right[:, later].transpose(1, 2)))
        if size < tokens:  # s > t counts twice
            products[:, :, size:] *= 2
        found.append(products.sum((1, 2), dtype=torch.float64))
    return _added(found)


def _by_equal_tokens(ids_BT: Tensor, grads_BTN: Tensor, _rows: int) -> Tensor:
    """What `_by_distinct_rows` finds, as products of tokens with the same id. The host need not wait for the number of
    distinct ids, but there are T^2 N operations."""
    products = torch.bmm(grads_BTN, grads_BTN.transpose(1, 2))
    return products.mul_(ids_BT[:, :, None] == ids_BT[:, None, :]).sum((1, 2), dtype=torch.float64)


def _by_distinct_rows(ids_BT: Tensor, grads_BTN: Tensor, rows: int) -> Tensor:
    """Squared norms [B] float64 of gradients whose row v is the sum of grads[t] over the tokens t with ids[t] = v.

    Only rows of tokens that occur are summed, so no tensor has the vocabulary's size.
    """
    first_rows = torch.arange(len(ids_BT), device=ids_BT.device)[:, None] * rows
    found: tuple[Tensor, Tensor] = (ids_BT + first_rows).flatten().unique(return_inverse=True)
    distinct, place = found
    sums = grads_BTN.new_zeros(len(distinct), grads_BTN.shape[2]).index_add_(0, place, grads_BTN.flatten(0, 1))
    of_rows: Tensor = torch.linalg.vector_norm(sums, dim=1).double().square()
    return of_rows.new_zeros(len(ids_BT)).index_add_(0, distinct // rows, of_rows)
