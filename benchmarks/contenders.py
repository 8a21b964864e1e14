"""The contenders: dptune's step with and without privacy. `peers.py` holds those of other libraries.

A contender turns one draw into one update of its own adapters or model: micro-batches, gradient, AdamW. All get the
same weights, adapter shape, draw, optimizer, and number of tokens (or examples) per forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from benchmarks.lengths import Draw, padded
from benchmarks.models import TARGETS, own_copy
from dptune import (
    CausalLMLoss,
    Ledger,
    PlainStep,
    PrivacyConfig,
    PrivateStep,
    add_lora,
    deal,
    trainable_parameters,
)

PRIVATE, PLAIN = "dptune, private", "dptune, no privacy"
CLIP_NORM, NOISE_MULTIPLIER = 1.0, 1.0  # do not affect speed
_NUM_EXAMPLES = 75_329  # does not affect speed; the size of a set of abstracts


@dataclass(frozen=True)
class Job:
    """What all contenders have in common.

    Attributes:
        base: the loaded model.
        rank: rank of the adapters; None trains every parameter, without adapters.
        copied: whether to copy `base`, because other contenders start from it too.
    """

    base: Any
    device: torch.device
    batch: int
    block: int
    examples: int
    rank: int | None
    gradient_ckpt: bool
    copied: bool = True

    @property
    def token_budget(self) -> int:
        """The number of tokens in `batch` examples of `block` tokens."""
        return self.batch * self.block

    def own_model(self) -> Any:
        """A model for one contender, in training mode; without adapters every parameter is trained."""
        model = own_copy(self.base, share_weights=self.rank is not None) if self.copied else self.base
        if self.gradient_ckpt:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.requires_grad_(self.rank is None).train()


class Contender(Protocol):
    """One way to train."""

    name: str

    def step(self, draw: Draw) -> None:
        """One logical step: the whole draw, then one update."""

    def close(self) -> None:
        """Release threads and files."""


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every contender."""
    return torch.optim.AdamW(parameters, lr=1e-4)


class Ours:
    """dptune's step: it sorts the draw by length, cuts it by a token budget, and computes logits only for labels."""

    def __init__(self, job: Job, *, private: bool) -> None:
        self.name = PRIVATE if private else PLAIN
        self._job = job
        self._model = job.own_model()
        if job.rank is not None:
            add_lora(self._model, rank=job.rank, alpha=job.rank, targets=TARGETS)
        self._loss = CausalLMLoss(self._model)
        self._optimizer = adamw(trainable_parameters(self._model))
        self._open = ExitStack()
        folder = Path(self._open.enter_context(TemporaryDirectory()))
        self._step: PrivateStep | PlainStep = (
            _private_step(self._model, job, folder) if private else PlainStep(self._model, job.examples)
        )
        self._open.enter_context(self._step)

    def step(self, draw: Draw) -> None:
        for part in self._micro_batches(draw):
            ids, labels, _ = padded(part, self._job.device)
            self._step.backward(self._loss(ids, labels))
        self._step.finish()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        self._open.close()

    def _micro_batches(self, draw: Draw) -> Iterator[Draw]:
        lengths = np.array([len(ids) for ids, _ in draw])
        for rows in deal(np.arange(len(draw)), lengths, token_budget=self._job.token_budget)[0]:
            yield [draw[row] for row in rows]


def _private_step(model: nn.Module, job: Job, folder: Path) -> PrivateStep:
    """A real private step with clipping, secret noise and a ledger on disk."""
    config = PrivacyConfig(
        num_examples=max(_NUM_EXAMPLES, job.examples),
        expected_batch_size=job.examples,
        steps=1000,
        clip_norm=CLIP_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        delta=1e-7,
    )
    return PrivateStep(model, config, ledger=Ledger(folder / "ledger.jsonl"))
