"""What a resumed run of a classifier shares with the run before."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from utils.classification.classifier_task import identity_of
from utils.classification.model import load_in_mode


def test_the_identity_has_all_that_a_resumed_run_shares(planned: Any) -> None:
    one, other = (planned(seed=seed)[0] for seed in (1, 2))
    tokenizer = planned()[1]
    first, again, different = (load_in_mode(p.task, p.settings, tokenizer, p.plan.privacy) for p in (one, one, other))
    identity = identity_of(one, first)
    assert next(iter(identity)) == "finetune_mode", "a measured clip norm follows it"
    assert identity == identity_of(one, again)
    assert {"clip_norm", "training_data", "learning_rate", "steps", "seed", "checkpoint"} <= identity.keys()
    assert identity_of(other, different)["seed"] == 2


def test_a_validation_split_decides_only_if_it_is_declared_public(planned: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^--early_stopping_patience=2: the result would depend on the held-out"):
        planned(early_stopping_patience=2)
    decided = planned(early_stopping_patience=2, validation_is_public=True)
    task, tokenizer, _ = decided
    trained = load_in_mode(task.task, task.settings, tokenizer, task.plan.privacy)
    assert identity_of(task, trained)["selection"] == {"patience": 2, "keep_best": False}
    assert "selection" not in identity_of(planned()[0], trained)
