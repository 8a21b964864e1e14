"""Values made one ahead are those of their keys, whatever happens, and no thread is left over."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from utils.training.prefetch import OneAhead

WAIT = 30.0  # seconds until a test gives up


class Made:
    """A function that notes its keys, fails for some, and takes long for others."""

    def __init__(self, failing: str = "", slow: str = "") -> None:
        self.failing, self.slow = failing, slow
        self.keys: list[str] = []
        self.threads: set[threading.Thread] = set()
        self.together = self.most_together = 0

    def __call__(self, key: str) -> str:
        self.together += 1
        self.most_together = max(self.together, self.most_together)
        self.keys.append(key)
        self.threads.add(threading.current_thread())
        time.sleep(0.2 * (key in self.slow))
        self.together -= 1
        if key in self.failing:
            raise OSError(f"cannot read {key}")
        return key * 2

    def wait_for(self, keys: str) -> None:
        """Return when exactly these were begun."""
        end = time.monotonic() + WAIT
        while "".join(self.keys) != keys and time.monotonic() < end:
            time.sleep(0.001)
        assert "".join(self.keys) == keys


def test_the_next_value_is_made_while_the_caller_works() -> None:
    made = Made()
    with OneAhead(made, background=True) as ahead:
        assert ahead.take("a", "b") == "aa"
        made.wait_for("ab")  # without another call
        assert ahead.take("b", "c") == "bb"
        made.wait_for("abc")
        assert ahead.take("c") == "cc"
    made.wait_for("abc")
    assert threading.current_thread() not in made.threads
    assert len(made.threads) == 1


def test_without_a_background_each_value_is_made_when_it_is_taken() -> None:
    made = Made()
    with OneAhead(made, background=False) as ahead:
        assert ahead.take("a", "b") == "aa"
        assert made.keys == ["a"]
        assert ahead.take("b") == "bb"
    assert made.threads == {threading.current_thread()}


def test_a_value_of_another_key_is_thrown_away() -> None:
    made = Made()
    with OneAhead(made, background=True) as ahead:
        assert ahead.take("a", "b") == "aa"
        assert ahead.take("c", "b") == "cc"
        assert ahead.take("b") == "bb"
        assert ahead.take("b") == "bb"


def test_two_values_are_never_made_together() -> None:
    made = Made(slow="b")
    with OneAhead(made, background=True) as ahead:
        ahead.take("a", "b")
        made.wait_for("ab")
        assert made.together == 1  # it is slow
        assert ahead.take("c") == "cc"
    assert made.most_together == 1


def test_an_error_is_raised_where_its_value_is_taken() -> None:
    made = Made(failing="b")
    with OneAhead(made, background=True) as ahead:
        assert ahead.take("a", "b") == "aa"
        made.wait_for("ab")
        with pytest.raises(OSError, match="cannot read b"):
            ahead.take("b", "c")
        assert ahead.take("c", "b") == "cc"
        assert ahead.take("d", "b") == "dd"  # the failure of what nobody takes is nobody's
        assert made.keys[:3] == ["a", "b", "c"]


@pytest.mark.parametrize("failing", ["", "b"])
def test_no_thread_is_left_when_the_block_ends_early(failing: str) -> None:
    made = Made(failing)
    before = threading.active_count()
    with OneAhead(made, background=True) as ahead, suppress(KeyError):
        ahead.take("a", "b")
        raise KeyError("stop")
    assert threading.active_count() == before
