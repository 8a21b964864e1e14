"""What held-out rows decide about a run: when it ends, and which of its weights are released.

Both are computed from private steps and held-out rows, so they cost no privacy of the training data if the held-out
rows are public (or of people whose data are not trained on). When a run ends then depends on its noisy steps, and a
bound for a number of steps holds only if that number was fixed before. So epsilon is that of the whole plan, however
early a run ends.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dptune.adapter_files import torch_bytes
from utils.training.selection import HeldOutSelection

BEST_NAME = "best.pt"  # in a checkpoint's folder


@dataclass
class BestWeights:
    """The lowest held-out loss so far. Every rank has the same, apart from the weights of its own.

    Attributes:
        selection: what it decides.
        step, loss: the step with the lowest loss; 0 and infinity before the first evaluation after a step.
        waited: evaluations since then.
        weights: the trained parameters after that step, on the CPU, if they are kept.
    """

    selection: HeldOutSelection
    step: int = 0
    loss: float = math.inf
    waited: int = 0
    weights: list[Tensor] = field(default_factory=list)

    def see(self, step: int, loss: float | None, parameters: Sequence[nn.Parameter]) -> None:
        """Take the loss of an evaluation after a step; a loss that is not finite counts as no improvement."""
        if not self.selection.decides or loss is None:
            return
        if not loss < self.loss:
            self.waited += 1
            return
        self.step, self.loss, self.waited = step, loss, 0
        if self.selection.keep_best:
            self.weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    @property
    def is_over(self) -> bool:
        """Whether training ends."""
        return self.selection.patience is not None and self.waited >= self.selection.patience

    def files(self) -> dict[str, bytes]:
        """What a checkpoint keeps, by file name."""
        if not self.selection.decides:
            return {}
        state = {"step": self.step, "loss": self.loss, "waited": self.waited, "weights": self.weights}
        return {BEST_NAME: bytes(torch_bytes(state))}

    @torch.no_grad()
    def put_back(self, parameters: Sequence[nn.Parameter]) -> int | None:
        """Give the parameters the best weights, if they are kept; returns the step that these are from."""
        if not self.weights:
            return None
        for parameter, best in zip(parameters, self.weights, strict=True):
            parameter.copy_(best)
        return self.step


def resumed_best(selection: HeldOutSelection, checkpoint: Path | None) -> BestWeights:
    """The state that a checkpoint kept. It starts anew if there is none, because the flags are new."""
    file = None if checkpoint is None else checkpoint / BEST_NAME
    if not selection.decides or file is None or not file.is_file():
        return BestWeights(selection)
    state: Mapping[str, object] = torch.load(io.BytesIO(file.read_bytes()), map_location="cpu", weights_only=True)
    found = BestWeights(selection, **state)  # type: ignore[arg-type]
    return found if found.weights or not selection.keep_best else BestWeights(selection, waited=0)
