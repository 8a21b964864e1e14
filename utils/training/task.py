"""What a training is about, once its model is loaded: rows, losses, evaluation, and how the result is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dptune.report.card import Artifact
from dptune.report.statement import PrivacyStatement
from dptune.units.batches import Rows
from utils.models.trainable import Losses
from utils.training.micro_batches import MicroBatches

PER_TOKEN, PER_EXAMPLE = "nats a token", "nats an example"  # units of losses


@dataclass(frozen=True)
class Finished:
    """A run that has ended, for what is saved last.

    Attributes:
        folder: the run's; everything but what was trained is in it.
        statement: what is guaranteed.
        identity: what a resumed run must share.
        diagnostics: rows of the diagnostics. NOT private.
        results: final figures. NOT private.
    """

    folder: Path
    statement: PrivacyStatement
    identity: Mapping[str, Any]
    diagnostics: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]


class Task(Protocol):
    """A language model or a classifier that is about to be trained."""

    @property
    def model(self) -> nn.Module:
        """Its trainable parameters are trained."""

    @property
    def rows(self) -> Rows:
        """The training set."""

    @property
    def losses(self) -> Losses:
        """(**what `rows.batch` gives) -> one loss per row, [B]."""

    @property
    def loss_unit(self) -> str:
        """PER_TOKEN or PER_EXAMPLE."""

    @property
    def trained(self) -> Sequence[str] | None:
        """Names of the model's own parameters, if they are trained; None for adapters."""

    @property
    def head(self) -> Sequence[str]:
        """Names of the parameters that may have a learning rate of their own."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a resumed run must share beside the mechanism, as JSON values."""

    @property
    def base_model(self) -> str:
        """Name or folder of the model that is fine-tuned."""

    @property
    def artifact(self) -> Artifact:
        """What comes of it, for the model card."""

    def evaluate(self, micro_batches: MicroBatches) -> dict[str, Any]:
        """Fields of `StepMetrics` about held-out data, the same on every rank; the model is in evaluation mode."""

    def save(self, finished: Finished) -> list[str]:
        """Write what was trained, after everything else is written; lines for a person say what is where."""
