"""Canary rows for the audit of a training: random tokens, each learned or not by a secret fair coin.

All canaries are rows of the training set, are drawn like every row, and count in the number of examples that epsilon is
computed from. The labels of those whose coin says "out" are ignored, so their gradients are zero. A run with canaries
is not published, because it learned random text.

The coins and the tokens come from the operating system, never from --seed. They stay in the run's folder, so that a
resumed run has the same canaries.

Shapes: M canaries, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dptune._validate import refuse
from dptune.audit.training import AUDIT_FOLDER, CANARIES_NAME, Canaries, read_canaries, write_canaries
from utils.data.tokenization import TokenizedDataset
from utils.models.trainable import Losses

FLAG = "--audit_canaries"
_MOST_TOKENS = 64  # of a canary
_AT_ONCE = 8  # canaries in a forward pass
LOSS_SCORE = "loss of the finished model"


def canaries_of_run(count: int, folder: Path, tokens: Sequence[int], block_size: int, *, resumed: bool) -> Canaries:
    """New canaries, or those that a resumed run began with. Main process only.

    Args:
        count: M.
        folder: the run's.
        tokens: the ids that random text is made of.
        block_size: maximum number of tokens per row.
        resumed: whether the run is resumed.

    Raises:
        InvalidArgument: the resumed run began with other canaries, or their file is lost.
    """
    path = folder / AUDIT_FOLDER / CANARIES_NAME
    if resumed:
        found = resumed_canaries(path, FLAG, count)
        if found.ids is None or found.before is None:
            refuse(FLAG, str(path), "has no tokens or losses of the start; restore it from the run")
        return found
    random = np.random.default_rng()  # seeded by the operating system
    ids = random.choice(np.array(tokens, dtype=np.int32), size=(count, min(_MOST_TOKENS, block_size)))
    return Canaries(random.integers(0, 2, count).astype(bool), {}, ids=ids)


def resumed_canaries(path: Path, flag: str, count: int) -> Canaries:
    """The canaries that a resumed run began with.

    Raises:
        InvalidArgument: it began with another number than `flag` asks for now, or their file is lost.
    """
    found = read_canaries(path)
    if len(found.included) != count:
        refuse(flag, count, f"the run began with {len(found.included)} canaries in {path}; resume with that number")
    return found


def require_rows(train: TokenizedDataset, flag: str, count: int) -> None:
    """Refuse a training set to which no rows can be added that are drawn like all others.

    Raises:
        InvalidArgument: rows are not the privacy unit, or are drawn with weights.
    """
    if train.authors is not None:
        refuse(flag, count, "canaries are rows; leave --privacy_unit out")
    if train.parts is not None:
        refuse(flag, count, "rows have weights; leave --train_file_weights out")


def with_canaries(train: TokenizedDataset, canaries: Canaries) -> TokenizedDataset:
    """The training set with all canaries behind its rows; only those whose coin says so have tokens to learn.

    The arrays are then in memory, also those of rows that were mapped from files.

    Raises:
        InvalidArgument: rows are not the privacy unit, or are drawn with weights.
    """
    require_rows(train, FLAG, len(canaries.included))
    rows = _rows_of(canaries, canaries.included)
    return replace(
        train,
        ids=np.concatenate([train.ids, rows.ids]),
        is_answer=np.concatenate([train.is_answer, rows.is_answer]),
        starts=np.concatenate([train.starts, train.starts[-1] + rows.starts[1:]]),
    )


def begin(folder: Path, canaries: Canaries, model: nn.Module, losses: Losses, device: torch.device) -> None:
    """Keep the canaries in the run's folder before its first step, with their losses at the start. Main process
    only."""
    if canaries.before is None:
        before = measured(canaries, model, losses, device)
        write_canaries(folder / AUDIT_FOLDER / CANARIES_NAME, replace(canaries, before=before))


def finish_canaries(folder: Path, model: nn.Module, losses: Losses, device: torch.device) -> None:
    """Add the scores of the finished model. Main process only.

    The adversary sees the model at the start and the finished one: its score is by how much the loss fell.
    """
    path = folder / AUDIT_FOLDER / CANARIES_NAME
    canaries = read_canaries(path)
    if canaries.before is None:
        refuse(FLAG, str(path), "has no losses of the start; restore it from the run")
    score = canaries.before - measured(canaries, model, losses, device)
    write_canaries(path, replace(canaries, scores={LOSS_SCORE: score}))


@torch.no_grad()
def measured(canaries: Canaries, model: nn.Module, losses: Losses, device: torch.device) -> np.ndarray:
    """The loss of every canary, whatever its coin, float64 [M]. The model's mode is as before afterwards."""
    rows, was_training = _rows_of(canaries, np.ones(len(canaries.included), dtype=bool)), model.training
    model.eval()
    found = []
    for start in range(0, len(rows), _AT_ONCE):
        batch = rows.batch(np.arange(start, min(start + _AT_ONCE, len(rows))), 0)
        found.append(losses(batch["input_ids"].to(device), batch["labels"].to(device)).double().cpu())
    model.train(was_training)
    losses_M: np.ndarray = torch.cat(found).numpy()
    return losses_M


def _rows_of(canaries: Canaries, learned: np.ndarray) -> TokenizedDataset:
    """The canaries as rows, of which some have tokens to learn."""
    if canaries.ids is None:
        raise RuntimeError("these canaries have no tokens")
    count, size = canaries.ids.shape
    is_answer = np.repeat(learned[:, None], size, axis=1)
    is_answer[:, 0] = False  # nothing predicts it
    starts = np.arange(count + 1, dtype=np.int64) * size
    return TokenizedDataset(canaries.ids.astype(np.int32).ravel(), is_answer.ravel(), starts, num_cut=0)
