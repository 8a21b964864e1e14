"""The per-example gradients of all parameters from one backward pass: their norms and their weighted sums."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dptune.per_example.uses import Outer, Use, joined_uses, squared_norms


class HalfAdded(RuntimeError):
    """A weighted sum failed after part of it was added. The sum is spoiled and must not be used."""


class Recorded:
    """Per-example gradients of one micro-batch of B examples (or privacy units), by parameter.

    Args:
        uses: {parameter: the contributions of each layer that uses it}, as the rules return them.
    """

    def __init__(self, uses: Mapping[str, list[Use]]) -> None:
        self._uses = {name: joined_uses(own) for name, own in uses.items()}

    def __bool__(self) -> bool:
        return bool(self._uses)

    def copied(self) -> Recorded:
        """The same gradients, not copied in memory, for another weighted sum of them."""
        return Recorded(self._uses)

    def folded(self, rows_per_unit: int) -> Recorded:
        """The same with every `rows_per_unit` neighbouring examples as one unit, whose gradient is their sum."""
        if rows_per_unit == 1:
            return self

        def fold(use: Use) -> Use:
            if isinstance(use, Outer):
                return use.folded(rows_per_unit)
            summed: Tensor = use.unflatten(0, (-1, rows_per_unit)).sum(1)
            return summed

        return Recorded({name: [fold(use) for use in own] for name, own in self._uses.items()})

    def squared_norms(self) -> dict[str, Tensor]:
        """{parameter: squared Euclidean norms [B] float64}; for a tied parameter, of the sum over its uses."""
        return {name: squared_norms(own) for name, own in self._uses.items()}

    def materialised(self) -> dict[str, Tensor]:
        """{parameter: gradients [B, *shape]}. For small models and tests: it takes B times the model's memory."""
        made = {
            name: [use.materialised() if isinstance(use, Outer) else use for use in own]
            for name, own in self._uses.items()
        }
        return {name: sum(own[1:], start=own[0]) for name, own in made.items()}

    def add_weighted_sums(self, totals: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """totals[name] += sum over b of weights[name][b] times example b's gradient, which is consumed.

        An example with weight 0 is skipped, because 0 * inf is not 0. Materialised gradients are summed first and added
        last, when nothing can fail any more. Products of factors are added to the total directly, so running out of
        memory there spoils it.

        Raises:
            HalfAdded: an error after the first product was added.
        """
        sums: list[tuple[str, Tensor]] = []
        outers: list[tuple[str, Outer]] = []
        for name, own in self._uses.items():
            for use in own:
                if isinstance(use, Outer):
                    outers.append((name, use))
                else:
                    sums.append((name, _weighted_sum(use, weights[name])))
        self._uses.clear()
        begun = False
        try:
            while outers:
                name, outer = outers.pop()
                keep = weights[name] > 0
                weights_B = weights[name]
                if not bool(keep.all()):
                    outer, weights_B = outer.chosen(keep), weights_B[keep]
                for _ in outer.adding_weighted_sum(totals[name], weights_B):
                    begun = True
        except (RuntimeError, MemoryError) as error:
            if begun:
                raise HalfAdded(
                    "memory ran out while gradients were added up, so the step is lost; resume from the last "
                    f"checkpoint with smaller micro-batches ({type(error).__name__})"
                ) from None
            raise
        for name, total in sums:
            totals[name].add_(total.view_as(totals[name]))


def _weighted_sum(grads: Tensor, weights_B: Tensor) -> Tensor:
    grads_BN, keep = grads.flatten(1), weights_B > 0
    weights = weights_B.to(grads.dtype)
    if not bool(keep.all()):
        grads_BN, weights = grads_BN[keep], weights[keep]
    return weights @ grads_BN
