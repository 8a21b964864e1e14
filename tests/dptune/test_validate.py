"""Every refusal is one line: the name, the value, the remedy."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest

from dptune import InvalidArgument
from dptune._validate import (
    HIDDEN,
    present,
    refuse,
    require_count,
    require_delta,
    require_positive,
    require_probability,
    require_within,
)


def test_the_shape_of_an_error() -> None:
    with pytest.raises(InvalidArgument) as caught:
        refuse("clip_norm", "a", "give a number")
    assert str(caught.value) == "clip_norm='a': give a number"
    assert isinstance(caught.value, ValueError)


def positive(value: float) -> None:
    require_positive("x", value)


def probability(value: float) -> None:
    require_probability("x", value)


def count(value: float) -> None:
    require_count("x", value)  # type: ignore[arg-type]


def count_from_zero(value: float) -> None:
    require_count("x", value, minimum=0)  # type: ignore[arg-type]


def within(value: float) -> None:
    require_within("x", value, (1e-3, 1e3))


def delta_of_a_hundred(value: float) -> None:
    require_delta(value, 100)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (positive, [1e-300, 1, 1e300], [0, -1, math.nan, math.inf, -math.inf]),
        (probability, [1e-9, 0.5, 1], [0, -0.1, 1 + 1e-9, math.nan, math.inf]),
        (count, [1, 2, 2**63 - 1, 3.0], [0, -1, 1.5, True, False, math.nan, math.inf, 2**63, 10**400]),
        (within, [1e-3, 1, 1e3], [0, -1, 0.9e-3, 1.1e3, math.nan, math.inf]),
        (count_from_zero, [0, 1], [-1, 0.5, False]),
        (require_delta, [1e-300, 1e-7, 0.999], [0, 1, -1e-7, 2, math.nan, math.inf]),
        (delta_of_a_hundred, [1e-7, 0.00999], [0.01, 0.5, 1]),
    ],
)
def test_ranges(check: Callable[[float], None], good: list[float], bad: list[float]) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(InvalidArgument) as caught:
            check(value)
        assert f"={value!r}: " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_refusal_carries_its_parts_and_reads_as_one_line() -> None:
    with pytest.raises(InvalidArgument) as caught:
        refuse("delta", 2.0, "give a number below 1")
    assert (caught.value.name, caught.value.value, caught.value.remedy) == ("delta", 2.0, "give a number below 1")
    assert str(caught.value) == "delta=2.0: give a number below 1"


def test_a_hidden_value_is_not_shown() -> None:
    with pytest.raises(InvalidArgument) as caught:
        refuse("key", HIDDEN, "set it again")
    assert str(caught.value) == "key: set it again"
    assert str(pickle.loads(pickle.dumps(caught.value))) == "key: set it again"


def test_a_refusal_travels_to_another_process_though_its_value_cannot() -> None:
    refusal = InvalidArgument("model", lambda: None, "give a model")
    received = pickle.loads(pickle.dumps(refusal))
    assert str(received) == str(refusal)
    assert (received.name, received.remedy) == ("model", "give a model")


def test_what_must_be_there_is_given_back_or_missed() -> None:
    assert present(0, "count") == 0
    with pytest.raises(RuntimeError, match="there is no count"):
        present(None, "count")
