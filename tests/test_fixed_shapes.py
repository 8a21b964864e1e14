"""A row adds the same bits to the sum, whichever rows are drawn with it and at any place in the micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptune import CausalLMLoss, PerExampleGradients, PrivacyConfig, PrivateStep, add_lora
from dptune.mechanism import ROUNDING
from dptune.shapes import Shapes, deal_in_shapes
from dptune.units.batches import AuthorDraw, Part, Rows, UnitDraw, parts_of
from tests.classifier_folders import SIZES
from tests.examples import random_examples, randomise_adapters
from tests.private_sum import NoNoise, sum_so_far
from tests.tiny import tiny_llama
from tests.utils.classification.test_losses import bert
from utils.classification.dataset import ClassificationDataset
from utils.classification.losses import ClassificationLoss
from utils.classification.mode_defaults import MODES
from utils.classification.modes import prepare_mode
from utils.data.tokenization import TokenizedDataset

COUNT, LONGEST = 40, 48
SHAPES = Shapes(LONGEST, 4 * LONGEST, drawn=2000, masked=False)  # up to six rows per micro-batch
MASKED = replace(SHAPES, masked=True)
Losses = Callable[..., Tensor]


def texts() -> TokenizedDataset:
    examples = random_examples(COUNT, seed=3, vocab_size=400, shortest=3, longest=LONGEST)
    ids = [np.array(ids, dtype=np.int32) for ids, _ in examples]
    answers = [np.array(labels) != -100 for _, labels in examples]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in ids])])
    return TokenizedDataset(np.concatenate(ids), np.concatenate(answers), starts, num_cut=0)


def sentences() -> ClassificationDataset:
    chance = np.random.default_rng(0)
    widths = [*SHAPES.widths, LONGEST, LONGEST]
    lengths = np.append(chance.integers(3, LONGEST, COUNT - len(widths)), widths)
    starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    ids = chance.integers(5, SIZES["vocab_size"], lengths.sum(), dtype=np.int32)
    return ClassificationDataset(ids, None, starts, chance.integers(0, 3, COUNT), num_cut=0)


def language_model(dtype: torch.dtype, *, whole: bool) -> tuple[nn.Module, Losses, Rows]:
    model = tiny_llama(hidden=64)
    if not whole:
        add_lora(model, rank=4, alpha=8.0)
        randomise_adapters(model)
    for parameter in model.parameters():
        if whole or not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model, CausalLMLoss(model), texts()


def classifier(dtype: torch.dtype, mode: str) -> tuple[nn.Module, Losses, Rows]:
    model, _ = prepare_mode(bert(max_position_embeddings=64), mode, lora_r=2, num_prepend_tokens=3)
    model = model.to(dtype).eval()
    return model, ClassificationLoss(model), sentences()


FRONT_DOORS: dict[str, Callable[[torch.dtype], tuple[nn.Module, Losses, Rows]]] = {
    "adapters": lambda dtype: language_model(dtype, whole=False),
    "whole model": lambda dtype: language_model(dtype, whole=True),
    **{f"classifier, {mode}": partial(classifier, mode=mode) for mode in MODES},
}


def contributions(
    model: nn.Module, losses: Losses, data: Rows, draw: UnitDraw, *, views: int = 1, **how: Any
) -> dict[int, Tensor]:
    """{item: its gradient as it is recorded, flat} of a draw, dealt as in a run.

    The last value says whether its micro-batch has padding. Models then use other kernels, which round alike here.
    """
    found = {}
    shapes = replace(MASKED if isinstance(data, ClassificationDataset) else SHAPES, views=views)
    with PerExampleGradients(model) as recorder:
        for part in parts_of(draw, data, views):
            for shape, shares in deal_in_shapes(
                part.items, part.tokens, shapes, rows_per_item=part.rows_per_unit, **how
            ):
                for items in shares:
                    found |= _of_micro_batch(recorder, losses, part, shape, items)
    return found


def _of_micro_batch(
    recorder: PerExampleGradients, losses: Losses, part: Part, shape: Any, items: np.ndarray
) -> dict[int, Tensor]:
    batch = part.batch(items, shape, 0)
    own = losses(**batch.inputs)
    (own if batch.weights is None else own * batch.weights).sum().backward()
    made = recorder.take().folded(part.rows_per_unit).materialised()
    rows = torch.cat([grads.flatten(1) for grads in made.values()], 1)
    assert not rows[len(items) :].any(), "what fills up adds exactly nothing"
    padded = not batch.inputs.get("attention_mask", torch.ones(1)).all()
    rows = F.pad(rows, (0, 1), value=float(padded))
    names = items if part.authors is None else [int(part.authors[item][0]) for item in items]
    return {int(name): row for name, row in zip(names, rows, strict=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("door", FRONT_DOORS)
def test_a_rows_contribution_is_its_own_to_the_bit(door: str, dtype: torch.dtype) -> None:
    model, losses, data = FRONT_DOORS[door](dtype)
    everybody = contributions(model, losses, data, np.arange(COUNT))
    chance = np.random.default_rng(1)
    draws = [np.flatnonzero(chance.random(COUNT) < share) for share in (0.1, 0.5)]
    draws += [np.array([row]) for row in (0, 17, COUNT - 1)] + [np.arange(COUNT)[::-1]]
    draws += [np.flatnonzero(data.lengths == width) for width in SHAPES.widths]
    for draw in draws:
        for ranks in (1, 2):
            for row, gradient in contributions(model, losses, data, draw, ranks=ranks).items():
                assert torch.equal(gradient, everybody[row]), f"row {row} among {len(draw)} on {ranks} ranks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_authors_contribution_is_their_own_to_the_bit(dtype: torch.dtype) -> None:
    model, losses, data = language_model(dtype, whole=False)
    authors = np.split(np.arange(COUNT), np.cumsum([1, 2, 3, 4, 5, 5, 5, 5, 5]))
    everybody = contributions(model, losses, data, AuthorDraw(list(authors), mean=True, most=5))
    for gone in range(len(authors)):
        others = [rows for number, rows in enumerate(authors) if number != gone]
        for name, gradient in contributions(model, losses, data, AuthorDraw(others, mean=True, most=5)).items():
            assert torch.equal(gradient, everybody[name])


@pytest.mark.parametrize("door", ["adapters", "classifier, full"])
def test_the_contribution_of_a_row_with_views_is_its_own_to_the_bit(door: str) -> None:
    model, losses, data = FRONT_DOORS[door](torch.bfloat16)
    everybody = contributions(model, losses, data, np.arange(COUNT), views=3)
    for draw in (np.arange(0, COUNT, 3), np.array([17]), np.arange(COUNT)[::-1]):
        for row, gradient in contributions(model, losses, data, draw, ranks=2, views=3).items():
            assert torch.equal(gradient, everybody[row])


def test_shapes_that_follow_the_draw_would_change_what_others_add() -> None:
    """The fault that fixed shapes prevent, so that the tests above can fail."""
    model, losses, data = language_model(torch.bfloat16, whole=False)
    seen = []
    for rows in ([5], [5, 9, 11, 20]):
        with PerExampleGradients(model) as recorder:
            losses(**data.batch(np.array(rows), 0)).sum().backward()
            made = recorder.take().materialised()
        seen.append(torch.cat([grads.flatten(1) for grads in made.values()], 1)[0])
    assert not torch.equal(*seen)


@pytest.mark.parametrize(("outputs", "at_once"), [(1, 8), (32, 8), (32, 64)])
def test_the_order_of_sums_changes_what_others_add_by_less_than_is_accounted_for(outputs: int, at_once: int) -> None:
    """16,384 rows whose gradients nearly point the same way, so that partial sums are as large as they can be.

    Without the first row, all others stand elsewhere. What they add then differs by rounding alone. Another row could
    point along that difference, so its whole length counts.
    """
    count, inputs, generator = 16_384, 200, torch.Generator().manual_seed(0)
    x = torch.randn(inputs, generator=generator) + 0.05 * torch.randn(count, inputs, generator=generator)
    weights = torch.randn(outputs, generator=generator)

    def clipped_sum(rows: Tensor) -> Tensor:
        model = nn.Linear(inputs, outputs, bias=False)
        config = PrivacyConfig(
            num_examples=count, expected_batch_size=count, steps=1, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5
        )
        with PrivateStep(model, config, ledger=None, noise=NoNoise(inputs * outputs), rank=1, world_size=2,
                         gather=lambda own: own) as step:  # type: ignore[arg-type]  # fmt: skip
            for part in rows.split(at_once):
                step.backward(model(part) @ weights)
            return sum_so_far(step).double()

    own = torch.outer(weights.double(), x[0].double()).flatten()
    others = clipped_sum(x) - clipped_sum(x[1:]) - own / own.norm()
    assert 0 < others.norm() < ROUNDING / 8
