"""The per-example gradients of all parameters from one backward pass: their norms and their weighted sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor

from dptune.per_example.flat_gradients import FlatGradients, add_to_totals, without_rows
from dptune.per_example.uses import Outer, Use, joined_uses, squared_norms

_SMALL = 1 << 16  # values per example of a gradient that is copied beside others, so that one product sums all


class HalfAdded(RuntimeError):
    """A weighted sum failed after part of it was added. The sum is spoiled and must not be used."""


class Recorded:
    """Per-example gradients of one micro-batch of B examples (or privacy units), by parameter.

    Args:
        uses: {parameter: the contributions of each layer that uses it}, as the rules return them.
        flat: those of the adapters.
    """

    def __init__(self, uses: Mapping[str, list[Use]], flat: FlatGradients | None = None) -> None:
        self._uses = {name: joined_uses(own) for name, own in uses.items()}
        self._flat = flat

    def __bool__(self) -> bool:
        return bool(self._uses) or self._flat is not None

    def copied(self) -> Recorded:
        """The same gradients, for another weighted sum of them. Those of adapters are copied in memory."""
        return Recorded(self._uses, None if self._flat is None else self._flat.copied())

    def taken(self, *names: str) -> Recorded:
        """The gradients of some parameters, which these gradients then lack."""
        return Recorded({name: self._uses.pop(name) for name in names if name in self._uses})

    def folded(self, rows_per_unit: int) -> Recorded:
        """The same with every `rows_per_unit` neighbouring examples as one unit, whose gradient is their sum."""
        if rows_per_unit == 1:
            return self

        def fold(use: Use) -> Use:
            if isinstance(use, Outer):
                return use.folded(rows_per_unit)
            summed: Tensor = use.unflatten(0, (-1, rows_per_unit)).sum(1)
            return summed

        flat = None if self._flat is None else self._flat.folded(rows_per_unit)
        return Recorded({name: [fold(use) for use in own] for name, own in self._uses.items()}, flat)

    def squared_norms(self, groups: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """{group: squared Euclidean norms [B] float64}; for a tied parameter, of the sum over its uses.

        Args:
            groups: {parameter: the group that it is measured with}; by default each is one.
        """
        groups = _Own() if groups is None else groups
        found = [(groups[name], own) for name, own in squared_norms(self._uses).items()]
        if self._flat is not None:
            found += self._flat.squared_norms(groups)
        parts: dict[str, list[Tensor]] = {}
        for group, squared in found:
            parts.setdefault(group, []).append(squared)
        return {group: own[0] if len(own) == 1 else torch.stack(own).sum(0) for group, own in parts.items()}

    def materialised(self) -> dict[str, Tensor]:
        """{parameter: gradients [B, *shape]}. For small models and tests: it takes B times the model's memory."""
        made = {
            name: [use.materialised() if isinstance(use, Outer) else use for use in own]
            for name, own in self._uses.items()
        }
        summed = {name: sum(own[1:], start=own[0]) for name, own in made.items()}
        return summed if self._flat is None else summed | self._flat.materialised()

    def add_weighted_sums(self, totals: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """totals[name] += sum over b of weights[name][b] times example b's gradient, which is consumed.

        An example with weight 0 is skipped, because 0 * inf is not 0. Materialised gradients are summed first and added
        last. Products of factors are added to the total directly, so running out of memory there spoils it.

        Raises:
            HalfAdded: an error after the first addition began. After any other `RuntimeError` or `MemoryError` the
                totals are as before.
        """
        left_out = {key: own == 0 for key, own in {id(own): own for own in weights.values()}.items()}
        sums: list[tuple[list[str], Tensor]] = [] if self._flat is None else list(self._flat.weighted_sums(weights))
        sums += self._sums_of_made(weights, left_out)
        outers = [(name, use) for name, own in self._uses.items() for use in own if isinstance(use, Outer)]
        self._uses.clear()
        self._flat = None
        begun = False
        try:
            while outers:
                name, outer = outers.pop()
                outer, weights_B = _without(outer, weights[name], left_out[id(weights[name])])
                for _ in outer.adding_weighted_sum(totals[name], weights_B):
                    begun = True
            begun = begun or bool(sums)  # a CPU copies what it adds, so this may fail
            for names, total in sums:
                add_to_totals(totals, names, total)
        except (RuntimeError, MemoryError) as error:
            if begun:
                raise HalfAdded(
                    "memory ran out while gradients were added up, so the step is lost; resume from the last "
                    f"checkpoint with smaller micro-batches ({type(error).__name__})"
                ) from None
            raise

    def _sums_of_made(
        self, weights: Mapping[str, Tensor], left_out: Mapping[int, Tensor]
    ) -> Iterator[tuple[list[str], Tensor]]:
        """(parameters, the weighted sum of their materialised gradients, flat)."""
        made = [(name, use) for name, own in self._uses.items() for use in own if not isinstance(use, Outer)]
        for joined in _joined(made, weights):
            names, weights_B = [name for name, _ in joined], weights[joined[0][0]]
            values = _side_by_side([use.flatten(1) for _, use in joined])
            yield names, weights_B.to(values.dtype) @ without_rows(values, left_out[id(weights_B)])


def _joined(made: list[tuple[str, Tensor]], weights: Mapping[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    """(parameter, gradients) in groups that are summed in one product: small ones with the same weights and type."""

    def kind(part: tuple[str, Tensor]) -> object:
        name, use = part
        return (id(weights[name]), use.dtype) if use[0].numel() <= _SMALL else name

    for _, group in groupby(made, kind):
        yield list(group)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _without(outer: Outer, weights_B: Tensor, rows_B: Tensor) -> tuple[Outer, Tensor]:
    """Factors and weights without some rows. On an accelerator they become 0, so that the host need not wait."""
    if rows_B.device.type != "cpu":
        return outer.without(rows_B), weights_B
    if not bool(rows_B.any()):
        return outer, weights_B
    return outer.chosen(~rows_B), weights_B[~rows_B]


class _Own(dict[str, str]):
    """Every parameter is a group of its own."""

    def __missing__(self, name: str) -> str:
        return name
