"""Flags of batch, steps and optimizer: what is refused."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from tests.classifier_settings import settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch_size", "0"), "--batch_size=0: give a whole number"),
        (("--micro_batch_size", "0"), "--micro_batch_size=0: give a whole number"),
        (("--num_train_epochs", "0"), "--num_train_epochs=0.0: give a finite number above 0"),
        (("--learning_rate", "0"), "--learning_rate=0.0: give a finite number above 0"),
        (("--head_learning_rate", "-1"), "--head_learning_rate=-1.0: give a finite number above 0"),
        (("--optimizer", "sgd"), "--learning_rate=None: --optimizer sgd needs it"),
        (("--weight_decay", "-1"), "--weight_decay=-1.0: give a number of at least 0"),
        (("--ema", "1"), "--ema=1.0: give a decay above 0 and below 1"),
        (("--ema", "0.9", "--average_last", "0.5"), "--average_last=0.5: ema 0.9 already asks for an exponential"),
        (("--weight_decay", "nan"), "--weight_decay=nan: give a number of at least 0"),
        (("--seed", "-1"), "--seed=-1: give a whole number of at least 0"),
        (("--seed", "4294967296"), "--seed=4294967296: give a whole number of at least 0 and below"),
    ],
)
def test_a_mistake_names_the_flag(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings(*flags)
