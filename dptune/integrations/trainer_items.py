"""The items that a `DPTrainer` trains on, with their collator: checked before training, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dptune.integrations.draws import Collator, Cutter, Examples, LeastBatches
from dptune.integrations.filling import FilledBatches
from dptune.integrations.items import check_on_random_items, longest_of, make_of_first
from dptune.integrations.values import require_known_values
from dptune.integrations.vocabulary import Vocabulary
from dptune.shapes import Shapes


@dataclass(frozen=True)
class TrainerItems:
    """A training set for one model.

    Attributes:
        model: the model.
        examples: the training set.
        collate: items -> inputs of a micro-batch.
        max_length: maximum tokens of an item; None for the model's context.
        private: whether the training is private.
    """

    model: nn.Module
    examples: Examples
    collate: Collator
    max_length: int | None
    private: bool

    def check_values(self, *, default_losses: bool) -> None:
        """Refuse a training set with an item that the model cannot read, before anything is released.

        Args:
            default_losses: whether the losses read labels and padding as `DefaultLosses` does.

        Raises:
            InvalidArgument: see `dptune.integrations.values.require_known_values`.
        """
        longest = longest_of(self.model, make_of_first(self.examples), self.max_length) if self.private else None
        require_known_values(
            self.model,
            self.examples,
            self.collate,
            labels=default_losses,
            plain=default_losses,
            longest=longest,
        )

    def check_rules(
        self,
        losses: Callable[[Mapping[str, Tensor]], Tensor],
        prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        *,
        most_rows: int,
    ) -> None:
        """Compare the engine's gradients with autograd's on random items, unless the training is not private.

        Args:
            losses: inputs of a micro-batch -> one loss per row, [B].
            prepare: moves inputs to the model's device.
            most_rows: the largest number of rows per item that is tried.

        Raises:
            InvalidArgument: see `dptune.integrations.items.check_on_random_items`.
        """
        if not self.private:
            return
        check_on_random_items(
            self.model,
            losses,
            lambda items: prepare(self.collate(items)),
            self.examples,
            max_length=self.max_length,
            most_rows=most_rows,
        )

    def cut(self, at_once: int, *, drawn: float, overhead: float, most_rows: int) -> Cutter:
        """Cuts items into micro-batches: of fixed shapes with privacy, and as few as fit without.

        Args:
            at_once: the most rows of a micro-batch.
            drawn: the expected number of items per step and process.
            overhead: see `dptune.shapes.Shapes`.
            most_rows: the largest number of rows per item.
        """
        if not self.private:
            return LeastBatches(self.collate, at_once)
        make = make_of_first(self.examples)
        longest = longest_of(self.model, make, self.max_length)
        shapes = Shapes(longest, at_once * longest, drawn, most_rows=at_once, overhead=overhead)
        return FilledBatches(self.collate, make, Vocabulary.of(self.model), shapes, most_rows)
