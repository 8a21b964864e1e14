"""What held-out rows decide about a run, in a file without torch, so that a command line can check it fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeldOutSelection:
    """What the held-out loss decides; see `utils.training.best`.

    Attributes:
        patience: evaluations without a lower loss after which training ends; None for the planned end.
        keep_best: whether the weights with the lowest loss are released instead of the last.
    """

    patience: int | None = None
    keep_best: bool = False

    @property
    def decides(self) -> bool:
        """Whether it decides anything."""
        return self.patience is not None or self.keep_best


NOTHING = HeldOutSelection()
