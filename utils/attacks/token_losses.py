"""The loss of each learned token of rows, under a model in memory.

Shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dptune.sharding import compute_device
from utils.data.tokenization import IGNORED, TokenizedDataset

_MOST_LOGITS = 1 << 24  # made at a time: 64 MB in float32
_MOST_TOKENS = 1 << 13


@torch.no_grad()
def token_losses(
    model: Any, data: TokenizedDataset, rows: Sequence[int] | np.ndarray, *, pad_token_id: int, what: str = "rows"
) -> list[np.ndarray]:
    """Negative log-likelihoods of the learned tokens of each row, float32 [learned tokens], in nats.

    They are the losses of training: the same tokens of the same rows, each row by itself.

    Args:
        model: a causal language model in evaluation mode.
        data: the tokenised rows.
        rows: which of them.
        pad_token_id: the padding; any id of the vocabulary works.
        what: names the rows where progress is shown.
    """
    found: dict[int, np.ndarray] = {}
    device, vocabulary = compute_device(model), int(model.get_input_embeddings().weight.shape[0])
    most = max(1, min(_MOST_TOKENS, _MOST_LOGITS // vocabulary))
    with tqdm(total=len(rows), desc=f"reading {what}", unit="row", delay=2) as bar:
        for part in _batches(data, rows, most):
            batch = {name: one.to(device) for name, one in data.batch(part, pad_token_id).items()}
            found |= zip(part, _losses(model, batch["input_ids"], batch["labels"]), strict=True)
            bar.update(len(part))
    return [found[int(row)] for row in rows]


def _losses(model: Any, input_ids: Tensor, labels: Tensor) -> list[np.ndarray]:
    """The losses of the labelled tokens of each row, from input_ids [B, T] and labels [B, T]."""
    logits, targets = model(input_ids=input_ids, use_cache=False).logits[:, :-1], labels[:, 1:]
    learned = targets.ne(IGNORED)
    flat = F.cross_entropy(logits[learned].float(), targets[learned], reduction="none")
    return [one.cpu().numpy() for one in flat.split(learned.sum(1).tolist())]


def _batches(data: TokenizedDataset, rows: Sequence[int] | np.ndarray, most: int) -> Iterator[list[int]]:
    """Rows of similar length together, of at most `most` padded tokens, or a single row."""
    batch: list[int] = []
    for row in sorted({int(one) for one in rows}, key=lambda one: (data.lengths[one], one)):
        if batch and (len(batch) + 1) * int(data.lengths[row]) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
