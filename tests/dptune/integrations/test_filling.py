"""Micro-batches of a Trainer: an item's contribution is its own to the bit, whichever items are drawn with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from dptune import InvalidArgument, PerExampleGradients, PrivacyConfig, PrivateStep
from dptune.integrations.authors import AuthorCollator, AuthorLosses
from dptune.integrations.filling import FilledBatches
from dptune.integrations.items import make_of
from dptune.integrations.losses import DefaultLosses, TrainerLosses
from dptune.integrations.vocabulary import Vocabulary
from dptune.mechanism import ROUNDING
from dptune.shapes import Shapes
from tests.classifiers import CLASSIFIERS, VOCABULARY, classifier
from tests.dptune.integrations.runs import Collator, data, features, lora_llama
from tests.examples import random_examples
from tests.private_sum import NoNoise, sum_so_far
from tests.tiny import tiny_llama
from tests.whole_models import whole_model

MASKED = ("input_ids", "attention_mask")
COUNT, LONGEST = 24, 32
SHAPES = Shapes(LONGEST, 8 * LONGEST, drawn=2000, most_rows=5)
examples = partial(random_examples, vocab_size=VOCABULARY)
Made = tuple[nn.Module, TrainerLosses, Any, list[Any]]


def padded(items: Sequence[Any]) -> dict[str, Tensor]:
    """Rows of token ids and a class, padded to the longest."""
    width = max(len(item["input_ids"]) for item in items)
    ids = torch.tensor([item["input_ids"] + [0] * (width - len(item["input_ids"])) for item in items])
    mask = torch.tensor([[n < len(item["input_ids"]) for n in range(width)] for item in items]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def stacked(items: Sequence[Any]) -> dict[str, Tensor]:
    """Features and a class."""
    return {"x": torch.stack([x for x, _ in items]), "labels": torch.tensor([label for _, label in items])}


def language(name: str) -> Made:
    return whole_model(name), DefaultLosses(), Collator(), features(examples(COUNT, seed=0))


def sentences(name: str) -> Made:
    rows = [{"input_ids": ids, "labels": number % 3} for number, (ids, _) in enumerate(examples(COUNT, seed=0))]
    return classifier(name), DefaultLosses(), padded, rows


def vectors() -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 4))

    def losses(model: Any, inputs: Any) -> Tensor:
        first = next(model.parameters())
        return nn.functional.cross_entropy(model(inputs["x"].to(first.dtype)), inputs["labels"], reduction="none")

    return model, losses, stacked, [(torch.randn(20), number % 4) for number in range(COUNT)]


def authors() -> Made:
    rows = data(COUNT + 5, seed=2)
    items = [rows[number : number + 1 + number % 5] for number in range(COUNT)]
    return tiny_llama(layers=1), AuthorLosses(), AuthorCollator(None), items  # type: ignore[arg-type]


def translation() -> Made:
    """Two lists of tokens with a mask each; rows are as long as allowed in none of them, in one, or in both."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "dropout": 0.0, "pad_token_id": 0}
    sizes |= {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)

    def collate(items: Sequence[Any]) -> dict[str, Tensor]:
        both = [padded([{"input_ids": row[name], "labels": 0} for row in items]) for name in ("source", "target")]
        return {f"{part}{name}": own[name] for part, own in zip(("", "decoder_"), both, strict=True) for name in MASKED}

    def losses(model: Any, inputs: Any) -> Tensor:
        logits = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2)
        targets = inputs["decoder_input_ids"][:, 1:]
        kept = inputs["decoder_attention_mask"][:, 1:]
        return (nn.functional.cross_entropy(logits, targets, reduction="none") * kept).sum(1) / kept.sum(1)

    chance = random.Random(0)
    lengths = [(chance.choice([LONGEST, 9, 21]), chance.choice([LONGEST, 12])) for _ in range(COUNT)]
    rows = [[[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in both] for both in lengths]
    return model, losses, collate, [{"source": source, "target": target} for source, target in rows]


DOORS: dict[str, Callable[[], Made]] = {
    **{name: partial(language, name) for name in ("Llama", "GPT-2", "OPT")},
    **{f"{name}, classes": partial(sentences, name) for name in CLASSIFIERS},
    "translation": translation,
    "vectors": vectors,
    "authors": authors,
}


def contributions(made: Made, draw: np.ndarray) -> dict[int, Tensor]:
    """{item: its gradient as it is recorded, flat}."""
    model, losses, collate, items = made
    counts = np.array([len(items[n]) if isinstance(items[n], list) else 1 for n in draw], dtype=np.int64)
    cut = FilledBatches(collate, make_of(items[0]), Vocabulary.of(model), SHAPES, 5 if counts.max() > 1 else 1)
    found: dict[int, Tensor] = {}
    with PerExampleGradients(model) as recorder:
        for batch in cut([items[n] for n in draw], counts):
            losses(model, batch.inputs).sum().backward()
            parts = recorder.take().folded(batch.rows_per_unit).materialised()
            rows = torch.cat([grads.flatten(1) for grads in parts.values()], 1)
            assert len(rows) == batch.units
            found |= dict(zip(draw[batch.items].tolist(), rows, strict=False))
    assert sorted(found) == sorted(draw)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("door", DOORS)
def test_an_items_contribution_is_its_own_to_the_bit(door: str, dtype: torch.dtype) -> None:
    made = DOORS[door]()
    made[0].to(dtype).eval()
    everybody = contributions(made, np.arange(COUNT))
    chance = np.random.default_rng(1)
    draws = [np.flatnonzero(chance.random(COUNT) < share) for share in (0.1, 0.5)]
    draws += [np.array([item]) for item in (1, 9, COUNT - 1)] + [np.delete(np.arange(COUNT), n) for n in (0, 7, 20)]
    for draw in draws:
        for item, gradient in contributions(made, draw).items():
            assert torch.equal(gradient, everybody[item]), f"item {item} among {len(draw)}"


def test_the_widest_item_of_a_draw_does_not_decide_the_width() -> None:
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in (8, 9, 32)]
    cut = FilledBatches(Collator(), make_of(rows[0]), Vocabulary.of(tiny_llama(layers=1)), SHAPES)
    for draw in ([0], [0, 1], [0, 1, 2]):
        narrow = cut([rows[n] for n in draw], np.ones(len(draw), dtype=np.int64))[-1]
        assert narrow.inputs["input_ids"].shape == (5, 10)
        assert narrow.items.tolist() == [n for n in draw if n < 2]


def test_items_that_fill_a_micro_batch_need_no_more_than_one_random_item() -> None:
    seen = []

    def watch(items: Sequence[Any]) -> Any:
        seen.append(len(items))
        return Collator()(items)

    rows = [{"input_ids": [1] * 9, "labels": [1] * 9}] * 7
    cut = FilledBatches(watch, make_of(rows[0]), Vocabulary.of(tiny_llama(layers=1)), SHAPES)
    made = cut(rows, np.ones(7, dtype=np.int64))
    assert seen == [6, 6]
    assert [(len(batch.items), batch.units, len(batch.inputs["labels"])) for batch in made] == [(5, 5, 5), (2, 5, 5)]


def test_a_collator_that_makes_other_rows_is_refused() -> None:
    rows = data(3)
    cut = FilledBatches(
        lambda items: Collator()(items[:-1]), make_of(rows[0]), Vocabulary.of(tiny_llama(layers=1)), SHAPES
    )
    with pytest.raises(InvalidArgument, match=r"^data_collator='input_ids': has 5 rows, where 6 are expected: say in"):
        cut(rows, np.ones(3, dtype=np.int64))


def test_values_that_are_not_rows_pass_unchanged() -> None:
    rows = data(2)

    def collate(items: Sequence[Any]) -> Any:
        return {**Collator()(items), "temperature": 2.0, "step": torch.tensor(3), "names": ["x"] * len(items)}

    cut = FilledBatches(collate, make_of(rows[0]), Vocabulary.of(tiny_llama(layers=1)), SHAPES)
    first = cut(rows, np.ones(2, dtype=np.int64))[0]
    assert (first.inputs["temperature"], first.inputs["step"].item()) == (2.0, 3)
    assert first.inputs["names"] == ["x"] * first.units


def test_in_float32_what_others_add_changes_by_far_less_than_is_accounted_for() -> None:
    """A plain Trainer's micro-batches follow the draw: without one row, the rest are padded and cut in another way."""
    count, model = 160, lora_llama()
    rows, losses = data(count), DefaultLosses()
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = PrivacyConfig(
        num_examples=count, expected_batch_size=count, steps=1, clip_norm=0.1, noise_multiplier=1.0, delta=1e-3
    )

    def clipped_sum(draw: np.ndarray) -> Tensor:
        with PrivateStep(
            model, config, ledger=None, noise=NoNoise(size), rank=1, world_size=2, gather=lambda own: own
        ) as step:
            for part in np.array_split(draw, 16):
                if len(part):
                    step.backward(losses(model, Collator()([rows[row] for row in part])))
            return sum_so_far(step).clone()

    everybody = np.arange(count)
    whole = clipped_sum(everybody)
    longest = int(np.argmax([len(row["input_ids"]) for row in rows]))
    changes = [
        whole - clipped_sum(np.delete(everybody, row)) - clipped_sum(np.array([row])) for row in (0, longest, count - 1)
    ]
    worst = max(change.norm().item() for change in changes) / config.clip_norm
    assert 0 < worst < ROUNDING / 100


def test_a_mask_without_padding_never_meets_one_with_padding() -> None:
    """Models leave out a mask of ones alone, and then run other kernels: a neighbour must not decide that."""
    model, _, collate, items = translation()
    cut = FilledBatches(collate, make_of(items[0]), Vocabulary.of(model), SHAPES)
    patterns = set()
    for batch in cut(items, np.ones(COUNT, dtype=np.int64)):
        own = {(len(items[n]["source"]) == LONGEST, len(items[n]["target"]) == LONGEST) for n in batch.items}
        assert len(own) == 1
        patterns |= own
    assert len(patterns) == 4, "the data must hold all four"
    row = {"input_ids": [1] * LONGEST, "labels": [1] * LONGEST}
    people = [[row, row], [row, {"input_ids": [1], "labels": [1]}], [row, row, row]]
    cut = FilledBatches(AuthorCollator(None), make_of(people[0]), Vocabulary.of(model), SHAPES, 4)  # type: ignore[arg-type]
    made = cut(people, np.array([2, 2, 3]))
    assert sorted(batch.items.tolist() for batch in made) == [[0], [1], [2]]


@pytest.mark.parametrize("rows", [1, 2])
def test_an_empty_micro_batch_is_the_smallest_and_holds_no_item(rows: int) -> None:
    def collate(items: Sequence[Any]) -> Any:
        return Collator()([item for item in items for _ in range(rows)])

    model = tiny_llama()
    cut = FilledBatches(collate, make_of(data()[0]), Vocabulary.of(model), SHAPES, rows)
    made = cut.empty(rows, data())
    assert made.inputs["input_ids"].shape == (rows, SHAPES.widths[0])
    assert (len(made.items), made.units, made.rows_per_unit) == (0, 1, rows)
