"""The average of the weights after each step, beside the weights that are trained (`dptune.averaging`).

Every rank keeps the average of what it holds: all trained parameters, or its shards. The average depends on the weights
alone, so ranks with the same weights have the same average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune._words import counted
from dptune.averaging import Averaging
from dptune.sharding import local_part, reshard


class IterateAverage:
    """The average over the steps of one run. Without an average in the settings, every method does nothing.

    Args:
        model: the parameters that are trainable now are averaged.
        averaging: which average.
        steps: number of planned steps.

    Attributes:
        count: how many steps the average holds.
        step: the last of them; 0 before the first.
        tensors: {name of a parameter: its average}, in float32 or in the parameter's precision if that is higher, and
            sharded like the parameter. Empty until the first step that counts.
    """

    def __init__(self, model: nn.Module, averaging: Averaging, steps: int) -> None:
        if averaging.is_on:
            reshard(model)  # a layer whose shards are gathered holds other tensors
        self._model, self._averaging, self._steps = model, averaging, steps
        self._parameters = {name: own for name, own in model.named_parameters() if own.requires_grad}
        self.count = self.step = 0
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights that the model has after `step`. Call it once per step, after the update."""
        if step < self._averaging.first(self._steps):
            return
        if not self.tensors:
            self._make_room()
        weight = self._averaging.weight(self.count)
        for name, parameter in self._parameters.items():
            average, iterate = local_part(self.tensors[name]), local_part(parameter)
            average.lerp_(iterate.to(average.dtype), weight)
        self.count, self.step = self.count + 1, step

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the average into the model for a `with` block. Afterwards its own weights are back, to the bit.

        Before the first step that counts, the model keeps its own weights. The block must not begin a backward pass.
        """
        before = [local_part(own).detach().clone() for own in self._parameters.values()] if self.count else []
        try:
            self.put_in()
            yield
        finally:
            self._set(before)

    def put_in(self) -> None:
        """Replace the model's weights by the average. Before the first step that counts, this does nothing."""
        self._set([local_part(self.tensors[name]) for name in self._parameters] if self.count else [])

    def in_words(self, step: int) -> str | None:
        """What the average holds after a step, in words; None if it is that step's weights themselves."""
        return self._averaging.in_words(self._steps, step)

    def resume(self, step: int, count: int) -> bool:
        """Make room for the average of a checkpoint, which the caller then fills in.

        Args:
            step: the checkpoint's step.
            count: how many steps its average holds.

        Returns:
            Whether the checkpoint's average is needed. It is not if more steps are planned now, and the average
            therefore begins after the checkpoint.

        Raises:
            InvalidArgument: with the steps that are planned now, the average would hold other steps.
        """
        expected = max(0, step + 1 - self._averaging.first(self._steps))
        if expected and count != expected:
            told = f"the checkpoint's average is over {counted(count, 'step')}"
            wanted = f"with {self._steps} planned steps it would be over {expected}"
            remedy = f"{told}, but {wanted}; resume with the number of steps that the run began with"
            refuse("average_last", self._averaging.average_last, remedy)
        self.count, self.step, self.tensors = expected, step if expected else 0, {}
        if expected:
            self._make_room()
        return bool(expected)

    def _make_room(self) -> None:
        self.tensors = {
            name: torch.zeros_like(own.detach(), dtype=torch.promote_types(own.dtype, torch.float32))
            for name, own in self._parameters.items()
        }

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        """Copy values, one per parameter, into what this rank holds of the parameters; [] changes nothing."""
        if not values:
            return
        reshard(self._model)  # what is gathered has the old values
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            local_part(parameter).copy_(value)
