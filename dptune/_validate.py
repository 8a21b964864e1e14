"""Checks of arguments. Every error is one line with the argument's name, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NoReturn, TypeVar

_T = TypeVar("_T")

_TOO_MANY = 2**63  # for a count in int64

HIDDEN: Final = object()  # stands for a value that a message must not show, or for no value at all


class InvalidArgument(ValueError):
    """The caller's mistake, not the program's. Programs print it on one line and exit with status 2.

    Attributes:
        name: the parameter, by the name it has where the error is raised; programs translate it into their flag.
        value: the given value, or HIDDEN.
        remedy: what is wrong and what to do, without the name.
    """

    def __init__(self, name: str, value: object, remedy: str) -> None:
        super().__init__(name, value, remedy)
        self.name, self.value, self.remedy = name, value, remedy

    def __str__(self) -> str:
        return f"{self.name}: {self.remedy}" if self.value is HIDDEN else f"{self.name}={self.value!r}: {self.remedy}"

    def __reduce__(self) -> tuple[Callable[..., InvalidArgument], tuple[str, str | None, str]]:
        """For another process: the value is sent as text, because the value itself may not be picklable."""
        return _received, (self.name, None if self.value is HIDDEN else repr(self.value), self.remedy)


class Described(str):
    """A value that messages show without quotes: a type's name, or the `repr` from another process."""

    def __repr__(self) -> str:
        return str(self)


def _received(name: str, shown: str | None, remedy: str) -> InvalidArgument:
    return InvalidArgument(name, HIDDEN if shown is None else Described(shown), remedy)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the parameters of `InvalidArgument`s raised inside the block: {name inside: the caller's name}."""
    try:
        yield
    except InvalidArgument as error:
        if error.name not in names:
            raise
        raise InvalidArgument(names[error.name], error.value, error.remedy) from error


def refuse(name: str, value: object, remedy: str) -> NoReturn:
    """Raise `InvalidArgument`, which reads `name=value: remedy`."""
    raise InvalidArgument(name, value, remedy)


def present(value: _T | None, what: str) -> _T:
    """`value`, if earlier code made sure that it is not None; `RuntimeError` if that code is wrong."""
    if value is None:
        raise RuntimeError(f"there is no {what}; earlier code should have made sure that there is one")
    return value


def require_positive(name: str, value: float, *, otherwise: str = "") -> None:
    """`value` must be a finite number above zero; `otherwise` says what else the user may have wanted."""
    if not (math.isfinite(value) and value > 0):
        refuse(name, value, f"give a finite number above 0{otherwise}")


def require_within(name: str, value: float, limits: tuple[float, float]) -> None:
    """`value` must be at least the first of `limits` and at most the second."""
    low, high = limits
    if not low <= value <= high:
        refuse(name, value, f"give a number from {low:g} to {high:g}")


def require_probability(name: str, value: float) -> None:
    """`value` must be in (0, 1]."""
    if not 0 < value <= 1:
        refuse(name, value, "give a number above 0 and at most 1")


def require_delta(value: float, num_examples: int | None = None, *, name: str = "delta") -> None:
    """delta must be in (0, 1), and below 1/n if the number of examples n is known.

    At 1/n or more, even publishing one random record satisfies the definition (Dwork and Roth 2014, section 2.3).
    """
    if not 0 < value < 1:
        refuse(name, value, "give a number above 0 and below 1")
    if num_examples is not None and value >= 1 / num_examples:
        refuse(name, value, f"must be below 1/num_examples = {1 / num_examples:.3g}; a tenth of that is usual")


def require_count(name: str, value: int, *, minimum: int = 1) -> None:
    """`value` must be a whole number of at least `minimum`, below 2^63."""
    if isinstance(value, bool) or not minimum <= value < _TOO_MANY or int(value) != value:
        limit = ", below 2^63" if value >= _TOO_MANY else ""
        refuse(name, value, f"give a whole number of at least {minimum}{limit}")
