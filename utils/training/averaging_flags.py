"""The flags --ema and --average_last of every program that trains: which average of the weights is released."""

from __future__ import annotations

from dptune._validate import renamed
from dptune.averaging import Averaging

# Metadata of their dataclass fields.
EMA = {
    "help": "release an exponential average of the weights after each step, with this decay (such as 0.95), instead of "
    "the last weights; costs no epsilon; default: none"
}
AVERAGE_LAST = {
    "help": "release the mean of the weights over the last part of training, given as a share of all steps (such as "
    "0.25), instead of the last weights; costs no epsilon; default: none"
}


def averaging_of(ema: float | None, average_last: float | None) -> Averaging:
    """The average of the weights that --ema and --average_last ask for; refuses a mistake by its flag."""
    with renamed({"ema": "--ema", "average_last": "--average_last"}):
        return Averaging(ema, average_last)
