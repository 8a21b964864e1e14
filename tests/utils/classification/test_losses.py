"""A loss is each example's own, wrong gradients are found before training, and every row is judged once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    RoFormerConfig,
    RoFormerForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from dptune import InvalidArgument
from dptune.shapes import Shapes
from tests.classifier_folders import SIZES
from tests.ranks import run_ranks
from utils.classification import losses as classification
from utils.classification.dataset import ClassificationDataset
from utils.classification.losses import ClassificationLoss, check_classifier_rules, predict
from utils.models.trainable import choose_trainable
from utils.training import micro_batches
from utils.training.micro_batches import MicroBatches

CLASSES = 3


def bert(**changed: Any) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**(SIZES | changed), num_labels=CLASSES)).eval()


def dataset(count: int = 17, *, token_types: bool = False) -> ClassificationDataset:
    chance = np.random.default_rng(0)
    lengths = chance.integers(2, 12, count)
    ids = chance.integers(5, SIZES["vocab_size"], lengths.sum(), dtype=np.int32)
    types = chance.integers(0, 2, len(ids)).astype(np.uint8) if token_types else None
    starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    return ClassificationDataset(ids, types, starts, chance.integers(0, CLASSES, count), num_cut=0)


@pytest.mark.parametrize("token_types", [False, True])
def test_a_loss_is_the_examples_own(token_types: bool) -> None:
    model, data = bert(), dataset(token_types=token_types)
    together = ClassificationLoss(model)(**data.batch(range(len(data)), 0))
    for index in range(len(data)):
        own = data.batch([index], 0)
        labels = own.pop("labels")
        torch.testing.assert_close(together[index : index + 1], F.cross_entropy(model(**own).logits, labels)[None])


def test_token_types_reach_the_model() -> None:
    model, batch = bert(), dataset(token_types=True).batch(range(5), 0)
    without = {name: values for name, values in batch.items() if name != "token_type_ids"}
    assert not torch.allclose(ClassificationLoss(model)(**batch), ClassificationLoss(model)(**without))


def test_an_ignored_label_gives_a_loss_and_a_gradient_of_exactly_zero() -> None:
    model = bert().train()
    loss = ClassificationLoss(model)(**dataset().batch([], 0))
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def check(model: Any, *, max_length: int = 24, token_types: bool = True) -> None:
    check_classifier_rules(model, num_classes=CLASSES, pad_token_id=0, token_types=token_types, max_length=max_length)


def test_a_model_that_couples_neighbours_is_refused_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were padding not masked, a row's gradient would depend on how long its neighbour is."""

    def unmasked(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(input_ids=inputs["input_ids"]).logits

    check(bert())
    monkeypatch.setattr(classification, "class_logits", lambda m, i: unmasked(m, i) + unmasked(m, i).mean(0))
    with pytest.raises(InvalidArgument, match="its per-example gradients differ from autograd's"):
        check(bert())


@pytest.mark.parametrize("max_length", [16, 17, 40])
def test_positions_that_switch_with_the_longest_row_are_refused_if_a_row_can_be_so_long(max_length: int) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    context = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    sizes = SIZES | {"hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = Phi3Config(**sizes | context, rope_parameters=rope, num_labels=CLASSES, pad_token_id=0)
    model = Phi3ForSequenceClassification(config)
    if max_length == 16:
        check(model, max_length=max_length, token_types=False)
        return
    with pytest.raises(InvalidArgument, match="its per-example gradients differ from autograd's"):
        check(model, max_length=max_length, token_types=False)


Classify = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Launch:
    """One of the processes of a launch, as `MicroBatches` sees it."""

    gather: Callable[[Tensor], Tensor] = lambda values: values
    rank: int = 0
    world_size: int = 1
    device = torch.device("cpu")

    @property
    def process_index(self) -> int:
        return self.rank

    @property
    def num_processes(self) -> int:
        return self.world_size


def predicted(
    classify: Classify, data: ClassificationDataset, *, budget: int = 40, **ranks: Any
) -> tuple[np.ndarray, float]:
    """`ranks`: what `Launch` is told."""
    accelerator: Any = Launch(**ranks)
    return predict(classify, data, MicroBatches(data, Shapes(64, budget), 0, accelerator))


def test_predictions_and_loss_are_those_of_one_row_at_a_time() -> None:
    model, data = bert(), dataset()
    classes, loss = predicted(lambda batch: model(**batch).logits, data)
    rows = [data.batch([index], 0) for index in range(len(data))]
    labels = [row.pop("labels") for row in rows]
    with torch.no_grad():
        logits = [model(**row).logits for row in rows]
    assert classes.tolist() == [row.argmax().item() for row in logits]
    wanted = sum(F.cross_entropy(*pair).item() for pair in zip(logits, labels, strict=True)) / len(data)
    assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("world_size", "count"), [(2, 17), (3, 17), (3, 2)])
def test_ranks_share_the_rows_and_judge_none_twice(world_size: int, count: int) -> None:
    """Rows that a rank is given to keep it in step with the others do not count."""
    data, seen = dataset(count), []

    def classify(batch: Mapping[str, Tensor]) -> Tensor:
        """Made of a row's own tokens, and cheap."""
        seen.append(len(batch["input_ids"]))
        sums = (batch["input_ids"] * batch["attention_mask"]).sum(1)
        return F.one_hot(sums % CLASSES, CLASSES).float()

    alone = predicted(classify, data)
    seen.clear()
    found = run_ranks(
        world_size, lambda rank, gather: predicted(classify, data, gather=gather, rank=rank, world_size=world_size)
    )
    for classes, loss in found:
        assert classes.tolist() == alone[0].tolist()
        assert loss == pytest.approx(alone[1])
    assert count <= sum(seen) < count + len(seen), "only dummies come on top"


def test_a_row_that_is_judged_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "deal", lambda rows, *_, **__: [[rows], [rows]])
    data = dataset(4)
    with pytest.raises(RuntimeError, match="evaluated twice"):
        run_ranks(
            2,
            lambda rank, gather: predicted(
                lambda batch: torch.zeros(len(batch["input_ids"]), CLASSES),
                data,
                gather=gather,
                rank=rank,
                world_size=2,
            ),
        )


NARROW: dict[str, Any] = {"vocab_size": 60, "num_labels": CLASSES, "pad_token_id": 0}
ODD: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a table of distances": (
        lambda: DebertaV2ForSequenceClassification(
            DebertaV2Config(
                **SIZES,
                num_labels=CLASSES,
                relative_attention=True,
                pos_att_type=["c2p", "p2c"],
                position_buckets=8,
                share_att_key=True,
            )
        ),
        "*_proj.weight",
        r"_proj: its input has \d rows, that of deberta\..*_proj has \d: each row must be an example; freeze the one",
    ),
    "changes an output in place": (
        lambda: LongformerForSequenceClassification(LongformerConfig(**SIZES, num_labels=CLASSES, attention_window=4)),
        "*.query.weight",
        r"^model=LongformerForSequenceClassification: does not run while per-example gradients are recorded",
    ),
    "time first": (
        lambda: XLNetForSequenceClassification(XLNetConfig(**NARROW, d_model=16, n_layer=2, n_head=2, d_inner=24)),
        "*layer_norm.weight",
        r"^model=XLNetForSequenceClassification: does not run while",
    ),
    "needs an end token": (
        lambda: T5ForSequenceClassification(
            T5Config(
                **NARROW,
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=1,
                num_heads=2,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        ),
        "classification_head*",
        r"^model=T5ForSequenceClassification: does not run .* <eos> token",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_model_that_cannot_be_recorded_is_refused_in_one_line(kind: str) -> None:
    make, trained, told = ODD[kind]
    model = make().eval()
    choose_trainable(model, [trained])
    with pytest.raises(InvalidArgument, match=told) as caught:
        check_classifier_rules(model, num_classes=CLASSES, pad_token_id=0, token_types=False, max_length=16)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_given_a_shape_passes_frozen_and_is_refused_trained() -> None:
    model = RoFormerForSequenceClassification(RoFormerConfig(**SIZES, num_labels=CLASSES)).eval()
    sizes: dict[str, Any] = {"num_classes": CLASSES, "pad_token_id": 0, "token_types": False, "max_length": 16}
    choose_trainable(model, ["classifier*"])
    check_classifier_rules(model, **sizes)
    choose_trainable(model, ["classifier*", "*.embed_positions.*"])
    with pytest.raises(InvalidArgument, match=r"embed_positions\.weight=RoFormer\w*: no per-example rule"):
        check_classifier_rules(model, **sizes)
