"""What a training run trains, once its model is loaded: rows, losses, evaluation, and how the result is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dptune.report.card import Artifact
from dptune.report.fields import CardFields
from dptune.report.prior import PriorRelease
from dptune.report.statement import PrivacyStatement
from dptune.units.batches import Rows
from utils.models.trainable import Losses
from utils.training.micro_batches import MicroBatches

PER_TOKEN, PER_EXAMPLE = "nats per token", "nats per example"  # units of losses


@dataclass(frozen=True)
class Finished:
    """A finished run, as `Task.conclude` gets it.

    Attributes:
        folder: the run's folder, with its part that may be published.
        statement: the privacy guarantee.
        identity: what a resumed run must share.
        diagnostics: the rows of the diagnostics. NOT private.
        results: the final figures. NOT private.
    """

    folder: Path
    statement: PrivacyStatement
    identity: Mapping[str, Any]
    diagnostics: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]


class Task(Protocol):
    """A language model or a classifier to train."""

    @property
    def model(self) -> nn.Module:
        """The model; its trainable parameters are trained."""

    @property
    def rows(self) -> Rows:
        """The training set."""

    @property
    def losses(self) -> Losses:
        """Called with the fields of `rows.batch` as keyword arguments; returns one loss per row, [B]."""

    @property
    def loss_unit(self) -> str:
        """PER_TOKEN or PER_EXAMPLE."""

    @property
    def trained(self) -> Sequence[str] | None:
        """Names of the model's own parameters, if they are trained; None for adapters."""

    @property
    def head(self) -> Sequence[str]:
        """Names of the parameters that may have their own learning rate."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a resumed run must share, besides the mechanism, as JSON values."""

    @property
    def base_model(self) -> str:
        """Name of the model that is fine-tuned, or its folder if its name on the hub is not known."""

    @property
    def starts_from(self) -> Sequence[PriorRelease]:
        """Earlier releases that the training starts from; empty if it starts anew."""

    @property
    def artifact(self) -> Artifact:
        """What the run produces, for the model card."""

    @property
    def card(self) -> CardFields:
        """What the model card says besides the guarantee."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Publishable settings that a reader of the result needs, JSON values by name."""

    def evaluate(self, micro_batches: MicroBatches) -> dict[str, Any]:
        """`StepMetrics` fields about held-out data, the same on every rank. The model is in evaluation mode."""

    def save(self, folder: Path) -> None:
        """Write the trained weights, and what is needed to load them, to a folder that will be published.

        Only the main process calls this. The others call `help_save` meanwhile.
        """

    def conclude(self, finished: Finished) -> list[str]:
        """Write further files to the run's folder, after everything else; returns printed lines. Main process only."""

    def help_save(self) -> None:
        """Take part in `save`, if each rank holds only its shard of the trained weights."""
