"""Flags of training that only plan: for which devices and how many rows --dry_run computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse, require_count
from utils.models.known_devices import KNOWN, Device, find_device


@dataclass
class PlanningArguments:
    """What --dry_run plans for, if not for this machine and the data."""

    _argument_group_name = "planning (with --dry_run)"

    for_device: str | None = field(
        default=None,
        metadata={
            "help": f"plan for this device: {', '.join(one.name for one in KNOWN)}, or any name with its memory, such "
            "as 'my card 24GB'; default: the devices of this launch"
        },
    )
    for_devices: int | None = field(
        default=None,
        metadata={"help": "plan for so many of --for_device, one process each; default: the launch's processes"},
    )
    num_examples: int | None = field(
        default=None,
        metadata={
            "help": "plan for so many rows (or authors, if they are drawn) without data, instead of --train_file"
        },
    )

    def __post_init__(self) -> None:
        _ = self.device
        if self.for_devices is not None:
            require_count("--for_devices", self.for_devices)
            if self.for_device is None:
                refuse("--for_devices", self.for_devices, "says how many, and --for_device says which; give that too")
        if self.num_examples is not None:
            require_count("--num_examples", self.num_examples)

    @property
    def device(self) -> Device | None:
        """The device of --for_device."""
        return None if self.for_device is None else find_device(self.for_device)
