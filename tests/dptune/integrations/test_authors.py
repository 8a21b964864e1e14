"""Rows and authors as Trainer data; removing one author changes the noiseless sum of a step by at most C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dptune.integrations.authors import AuthorCollator, AuthorItems, AuthorLosses
from dptune.integrations.transformers import DPTrainer
from dptune.losses import IGNORE
from dptune.units.unit import ItemUnit, group_by_author
from tests.dptune.integrations.runs import GradientLog, lora_llama, no_noise, privacy_arguments, training_arguments
from tests.examples import random_examples
from utils.data.features import RowFeatures
from utils.data.tokenization import TokenizedDataset

__all__ = ["no_noise"]

NAMES: list[str | None] = ["a", "b", "a", None, "c", "b", "a", "c", "a", None]
EXAMPLES = random_examples(len(NAMES), seed=3)


def tokens(keep: list[int]) -> TokenizedDataset:
    """Some of the rows, with their authors."""
    ids = [np.array(EXAMPLES[row][0], dtype=np.int32) for row in keep]
    is_answer = [np.array(EXAMPLES[row][1]) != IGNORE for row in keep]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    authors = group_by_author([NAMES[row] for row in keep])
    return TokenizedDataset(np.concatenate(ids), np.concatenate(is_answer), starts, 0, authors)


def author_items(tokens: TokenizedDataset, most: int) -> AuthorItems:
    assert tokens.authors is not None
    return AuthorItems(RowFeatures(tokens), tokens.authors, most)


EVERYBODY = tokens(list(range(len(NAMES))))


def test_an_authors_item_is_up_to_k_of_theirs_chosen_afresh() -> None:
    authors = author_items(EVERYBODY, 2)
    assert authors.counts.tolist() == [2, 2, 1, 2, 1]
    whole = RowFeatures(EVERYBODY)
    theirs = [whole[row] for row in (0, 2, 6, 8)]
    chosen = [authors[0] for _ in range(60)]
    assert all(len(rows) == 2 and all(row in theirs for row in rows) and rows[0] != rows[1] for rows in chosen)
    seen = [sum(row in rows for rows in chosen) for row in theirs]
    assert min(seen) > 10
    assert authors[2] == [whole[3]]


def test_authors_are_filled_up_by_rows_without_labels_and_weights_make_means() -> None:
    authors = author_items(EVERYBODY, 4)
    batch = AuthorCollator(None)([authors[0], authors[2]])
    assert len(batch["labels"]) == 8
    assert batch["labels"][5:].eq(IGNORE).all()
    assert batch["labels"][4, : len(EXAMPLES[3][1])].tolist() == EXAMPLES[3][1]
    assert batch["weights"].tolist() == [0.25] * 4 + [1.0] * 4


def test_rows_of_an_evaluation_have_no_weights() -> None:
    rows = RowFeatures(EVERYBODY)
    assert AuthorCollator(None)([rows[0], rows[1]]).keys() == {"input_ids", "attention_mask", "position_ids", "labels"}


def noiseless_sum(folder: Path, keep: list[int], clip_norm: float) -> torch.Tensor:
    """The sum of one DPTrainer step that draws every author."""
    dataset, log = author_items(tokens(keep), 4), GradientLog()
    DPTrainer(
        lora_llama(),
        training_arguments(
            folder, per_device_train_batch_size=len(dataset), gradient_accumulation_steps=1, max_steps=1
        ),
        AuthorCollator(None),
        dataset,
        privacy_args=privacy_arguments(clip_norm=clip_norm),
        losses=AuthorLosses(),
        rows_per_unit=dataset.counts,
        privacy_unit=ItemUnit("one author", "authors"),
        callbacks=[log],
    ).train()
    return log.grads[0] * len(dataset)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("clip_norm", [0.01, 0.037])
def test_one_author_moves_the_sum_by_at_most_c(clip_norm: float, tmp_path: Path) -> None:
    whole = noiseless_sum(tmp_path / "whole", list(range(len(NAMES))), clip_norm)
    moved: list[Any] = []
    for name in ("a", "b", "c"):
        keep = [row for row, author in enumerate(NAMES) if author != name]
        moved.append((whole - noiseless_sum(tmp_path / name, keep, clip_norm)).norm().item())
    assert max(moved) <= clip_norm * (1 + 1e-4)
    assert max(moved) > 0.5 * clip_norm
