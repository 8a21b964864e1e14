"""Per-example losses of a classifier, and predictions computed over all ranks.

Shapes: B examples per batch, T tokens, C classes, N examples of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dptune.integrations.peft import class_logits, require_known_method
from dptune.per_example import RandomRow, require_separate_rows
from utils.classification.dataset import ClassificationDataset
from utils.data.tokenization import IGNORED
from utils.training.micro_batches import MicroBatches


class ClassificationLoss:
    """Cross-entropy of each example, float32 [B]; exactly zero where the label is -100.

    Args:
        model: a classifier, plain or inside a `PeftModel`; see `dptune.integrations.peft.class_logits`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits_BC = class_logits(self.model, inputs).float()
        return F.cross_entropy(logits_BC, labels, ignore_index=IGNORED, reduction="none")


def check_classifier_rules(
    model: Any, *, num_classes: int, pad_token_id: int, token_types: bool, max_length: int
) -> None:
    """Before training, compare the engine's gradients with autograd's on random rows of different lengths.

    Args:
        model: the model to train, in float32.
        num_classes: number of classes of the task.
        pad_token_id: the tokenizer's pad token.
        token_types: whether rows have "token_type_ids".
        max_length: maximum tokens of a row, without virtual tokens, which the model adds.

    Raises:
        InvalidArgument: the engine does not know the PEFT method, or its rules do not describe the model's layers.
    """
    require_known_method(model)
    device = next(model.parameters()).device
    vocab_size = model.config.get_text_config().vocab_size

    def batch_of(rows: Sequence[RandomRow]) -> list[Tensor]:
        ids = pad_sequence([row.tokens(vocab_size) for row in rows], batch_first=True, padding_value=pad_token_id)
        mask = pad_sequence([torch.ones(row.length, dtype=torch.int64) for row in rows], batch_first=True)
        parts = [ids, torch.tensor([row.number % num_classes for row in rows]), mask]
        if token_types:
            types = [torch.randint(0, 2, (row.length,), generator=row.generator()) for row in rows]
            parts.append(pad_sequence(types, batch_first=True))
        return [part.to(device) for part in parts]

    require_separate_rows(model, ClassificationLoss(model), batch_of, longest=max_length)


@torch.no_grad()
def logits_of(
    classify: Callable[[Mapping[str, Tensor]], Tensor], data: ClassificationDataset, micro_batches: MicroBatches
) -> Tensor:
    """The logits of every example of a split. Each example runs on one rank.

    Args:
        classify: the inputs of B examples -> logits [B, C], with the model in evaluation mode.
        data: N examples, at least 1.
        micro_batches: deals the rows to this rank.

    Returns:
        Logits, float32 [N, C] on the CPU in the order of `data`, the same on every rank.
    """
    found = torch.empty(0)
    for rows, batch in micro_batches.dealt(data, np.arange(len(data))):
        del batch["labels"]
        logits_BC = classify(batch).double().cpu()
        if not len(found):  # the last column counts how often the example was seen
            found = torch.zeros(len(data), logits_BC.shape[1] + 1, dtype=torch.float64)
        if len(rows):  # otherwise the batch is the dummy of a rank without examples
            found[torch.from_numpy(rows)] = F.pad(logits_BC, (0, 1), value=1.0)
    accelerator = micro_batches.accelerator
    summed = accelerator.gather(found[None].to(accelerator.device)).sum(0).cpu()
    if not summed[:, -1].eq(1).all():
        raise RuntimeError("an example was evaluated twice, or not at all")
    return summed[:, :-1].float()


def predict(
    classify: Callable[[Mapping[str, Tensor]], Tensor], data: ClassificationDataset, micro_batches: MicroBatches
) -> tuple[np.ndarray, float]:
    """The predicted class of every example of a split, and the mean cross-entropy; for the arguments see `logits_of`.

    Returns:
        Classes, int64 [N] in the order of `data`, the same on every rank; and the loss in nats per example.
    """
    logits_NC = logits_of(classify, data, micro_batches)
    losses = F.cross_entropy(logits_NC, torch.from_numpy(data.labels), reduction="none")
    return logits_NC.argmax(1).numpy(), losses.double().mean().item()
