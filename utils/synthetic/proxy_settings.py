"""How the small models that compare texts are trained: apart from the models, so that flags do not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass

TINY = "tiny"
_TINY_RATE, _PRETRAINED_RATE = 3e-3, 5e-5


@dataclass(frozen=True)
class ProxySettings:
    """How the models are made and trained; they are kept for the same settings and texts only.

    Attributes:
        model: TINY, or folder or hub name of a causal language model.
        tokenizer: folder or hub name for the tiny model; None makes one from the held-out texts.
        steps, batch_size: of training; a batch is of windows.
        max_length: tokens of a window.
        learning_rate: highest of the cosine schedule; None is 3e-3 for the tiny model, 5e-5 for others.
        seed: of the tiny model's weights and of the batches.
    """

    model: str = TINY
    tokenizer: str | None = None
    steps: int = 600
    batch_size: int = 8
    max_length: int = 64
    learning_rate: float | None = None
    seed: int = 0

    @property
    def peak_rate(self) -> float:
        """The learning rate, or the model's default."""
        return self.learning_rate or (_TINY_RATE if self.model == TINY else _PRETRAINED_RATE)
