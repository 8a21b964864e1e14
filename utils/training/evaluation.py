"""Held-out loss of a language model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dptune.sampling import deal
from utils.data.tokenization import TokenizedDataset


@torch.no_grad()
def held_out_loss(
    losses: Callable[[Tensor, Tensor], Tensor],
    data: TokenizedDataset,
    *,
    token_budget: int,
    pad_token_id: int,
    device: torch.device,
    gather: Callable[[Tensor], Tensor],
    rank: int,
    world_size: int,
) -> float:
    """Mean negative log-likelihood of all labelled tokens, in nats a token, shared over the ranks.

    Args:
        losses: (input_ids [B, T], labels [B, T]) -> mean loss of each example [B].
        data: examples without a labelled token do not count.
        token_budget: padded tokens in one forward pass.
        pad_token_id, device: of the batches.
        gather: sums over ranks are taken through it.
        rank, world_size: this process's place.
    """
    counted = data.num_answer_tokens
    shares = deal(np.flatnonzero(counted), data.lengths, token_budget=token_budget, ranks=world_size)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in shares[rank]:
        batch = {key: value.to(device) for key, value in data.batch(rows, pad_token_id).items()}
        tokens = torch.as_tensor(counted[rows] if len(rows) else [0], device=device, dtype=torch.float64)
        total += torch.stack([(losses(batch["input_ids"], batch["labels"]).double() * tokens).sum(), tokens.sum()])
    loss, tokens = gather(total).view(-1, 2).sum(0).tolist()
    return loss / tokens
