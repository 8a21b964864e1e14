"""The flags of train_clm.py for a proposal, and the line that trains."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields

from utils.cli.flags import parse
from utils.cli.launch_lines import as_line, launch_words
from utils.models.known_devices import Device
from utils.training.arguments import CAUSAL_LM_GROUPS, OF_ADAPTER, Groups
from utils.training.lora_arguments import LoraArguments

PROGRAM = "train_clm.py"
_ALWAYS = ("lora_r", "lora_alpha")  # stated at their defaults too

Values = Mapping[str, object]  # {flag: its value, or a list of values}; True for a switch


def trained_flags(lora: LoraArguments) -> dict[str, object]:
    """The flags that choose what is trained, without those that the run would not read."""
    unread = OF_ADAPTER if lora.trainable or lora.initial_adapter else ()
    found = {}
    for one in fields(lora):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = getattr(lora, one.name)
        if one.name not in unread and (value != default or one.name in _ALWAYS):
            found[one.name] = value
    return found


def as_words(values: Values) -> list[str]:
    """The flags as words of a command line; numbers with as many figures as they need."""
    return [word for name, value in values.items() for word in (f"--{name}", *_values(value))]


def _values(value: object) -> Iterator[str]:
    if isinstance(value, list):
        yield from map(str, value)
    elif value is not True:
        yield f"{value:.12g}" if isinstance(value, float) else str(value)


def as_groups(values: Values) -> Groups:
    """The flags as train_clm.py reads them.

    Raises:
        InvalidArgument: it would refuse them.
    """
    return Groups(*parse(*CAUSAL_LM_GROUPS, args=as_words(values)))


def training_line(values: Values, device: Device | None, processes: int, *, shard: bool) -> str:
    """The line that trains, quoted for a POSIX shell.

    Args:
        values: the flags.
        device: the device; None for one process without a launcher.
        processes: how many processes.
        shard: whether weights are sharded.
    """
    if device is None:
        return f"python {shlex.join([PROGRAM, *as_words(values)])}"
    words = launch_words(PROGRAM, as_words(values), gpus=processes, shard=shard)
    return as_line([*([] if device.has_bfloat16 else ["--mixed_precision", "fp16"]), *words])
