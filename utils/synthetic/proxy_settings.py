"""Settings of the small models that compare texts, apart from the models so that flags do not import torch."""

from __future__ import annotations

from dataclasses import dataclass

TINY = "tiny"
_TINY_RATE, _PRETRAINED_RATE = 3e-3, 5e-5


@dataclass(frozen=True)
class ProxySettings:
    """How the models are made and trained. Saved results are reused only for the same settings and texts.

    Attributes:
        model: TINY, or folder or hub name of a causal language model.
        tokenizer: folder or hub name for the tiny model; None makes one from the held-out texts.
        steps, batch_size: of training; a batch consists of windows.
        max_length: tokens per window.
        learning_rate: peak of the cosine schedule; None is 3e-3 for the tiny model, 5e-5 for others.
        seed: seed of the tiny model's weights and of the batches.
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
