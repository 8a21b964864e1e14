"""Finds, in a run on random tokens, trained parameters that no loss reaches, and models that cannot be recorded.

A trained parameter that no forward pass uses has no gradient: a vision tower, for example, when all data are text.
Private training would still add noise to it at every step, and save it as trained.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from dptune._validate import HIDDEN, Described, InvalidArgument, refuse

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LONGEST_REASON = 160


def require_reached(trained: Iterable[str], reached: Collection[str]) -> None:
    """Refuse trained parameters of which no use was recorded.

    Args:
        trained: names of all trained parameters, in the model's order.
        reached: names of those whose gradient was recorded.

    Raises:
        InvalidArgument: there is one; the message names it and what the losses do reach.
    """
    missed = [name for name in trained if name not in reached]
    if not missed:
        return
    others = f" and {len(missed) - 1:,} other trained parameters" if missed[1:] else ""
    example = f", such as {common}.*" if (common := _common_parent(reached)) else ""
    remedy = f"freeze them, or choose layers that are reached{example}"
    refuse(missed[0], HIDDEN, f"the losses do not reach it{others}, so only noise would train there; {remedy}")


def _common_parent(names: Iterable[str]) -> str:
    """The longest name of a module that holds all these parameters; empty for the whole model."""
    columns = itertools.zip_longest(*(name.split(".")[:-1] for name in names))
    return ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))


def in_one_line(check: Callable[Concatenate[nn.Module, _P], _R]) -> Callable[Concatenate[nn.Module, _P], _R]:
    """Decorator of a check of a model: an error of the model becomes an `InvalidArgument`.

    Models fail in unrelated ways while they are recorded, deep inside: some change an output in place, others need
    certain tokens. Errors of running out of memory are not changed.
    """

    @functools.wraps(check)
    def checked(model: nn.Module, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return check(model, *args, **kwargs)
        except (InvalidArgument, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _does_not_run(model, error) from error

    return checked


def _does_not_run(model: nn.Module, error: Exception) -> InvalidArgument:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[: _LONGEST_REASON - 3]}..."
    remedy = "train fewer or other layers, or another model"
    told = f"does not run while per-example gradients are recorded ({type(error).__name__}: {reason}); {remedy}"
    return InvalidArgument("model", Described(type(model).__name__), told)
