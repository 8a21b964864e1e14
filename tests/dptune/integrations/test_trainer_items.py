"""The items of a `DPTrainer`: refused before training if rows are not announced, and cut into fixed shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.ledger import LEDGER_NAME
from tests.dptune.integrations.runs import COUNT, Collator, data, dp_trainer, lines


def test_rows_that_were_not_announced_are_refused(tmp_path: Path) -> None:
    def doubled(features: list[Any]) -> Any:
        return Collator()([feature for feature in features for _ in range(2)])

    with pytest.raises(
        InvalidArgument, match=r"^data_collator='input_ids': has \d+ rows, where \d+ are expected: say in"
    ):
        dp_trainer(tmp_path, data_collator=doubled).train()
    assert not (tmp_path / LEDGER_NAME).exists() or not lines(tmp_path)


@pytest.mark.parametrize("bf16", [True, False])
def test_an_item_is_always_in_a_micro_batch_of_one_shape(bf16: bool, tmp_path: Path) -> None:
    """In shapes that follow the draw, an item more would change the rounding of what the others add."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 8}
    trainer, shapes, filled = dp_trainer(tmp_path, bf16=bf16, **settings), dict[int, set[Any]](), False
    step = trainer.training_step

    def watch(model: Any, inputs: Any, *rest: Any) -> Any:
        nonlocal filled
        for batch in inputs["micro_batches"]:
            filled |= len(batch.items) < batch.units
            for item in batch.items:
                padded = not batch.inputs["attention_mask"].all()
                shapes.setdefault(int(item), set()).add((*batch.inputs["input_ids"].shape, padded))
        return step(model, inputs, *rest)

    trainer.training_step = watch  # type: ignore[method-assign]
    trainer.train()
    assert filled
    assert len(shapes) == COUNT
    assert all(len(own) == 1 for own in shapes.values())
    assert any(rows > 1 for own in shapes.values() for rows, _, _ in own)
    lengths = {item: len(row["input_ids"]) for item, row in enumerate(data())}
    assert all(lengths[item] <= width for item, ((_, width, _),) in shapes.items())
    assert len({width for ((_, width, _),) in shapes.values()}) > 1
