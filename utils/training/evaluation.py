"""Held-out loss of a language model."""

from __future__ import annotations

import numpy as np
import torch

from utils.data.tokenization import TokenizedDataset
from utils.models.trainable import Losses
from utils.training.micro_batches import MicroBatches


@torch.no_grad()
def held_out_loss(losses: Losses, data: TokenizedDataset, micro_batches: MicroBatches) -> float:
    """Mean negative log-likelihood of all labelled tokens, in nats per token, computed together by all ranks.

    Args:
        losses: (input_ids [B, T], labels [B, T]) -> mean loss of each example [B].
        data: has at least one labelled token; examples without one do not count.
        micro_batches: deals the rows to this rank.
    """
    counted, device = data.num_answer_tokens, micro_batches.accelerator.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for rows, batch in micro_batches.dealt(data, np.flatnonzero(counted)):
        tokens = torch.as_tensor(counted[rows] if len(rows) else [0], device=device, dtype=torch.float64)
        total += torch.stack([(losses(batch["input_ids"], batch["labels"]).double() * tokens).sum(), tokens.sum()])
    loss, tokens = micro_batches.accelerator.gather(total).view(-1, 2).sum(0).tolist()
    return loss / tokens
