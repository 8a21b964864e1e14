"""The devices that a run is planned for: those of this launch, or those of --for_device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from dptune.devices import computes_apart
from dptune.pass_overhead import pass_overhead
from utils.cli.launch import compute_dtype, describe_precision, precision_of_launch
from utils.cli.launch_lines import PLAIN_CONFIG
from utils.models.known_devices import Device
from utils.models.memory import device_memory
from utils.training.planning_arguments import PlanningArguments

_OTHER_DEVICE = torch.device("cuda")  # stands for any accelerator; nothing is computed there
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Target:
    """What a run computes on.

    Attributes:
        device: its kind, as torch names it.
        processes: how many there are, one process on each.
        dtype: what forward passes compute in.
        memory: bytes that a process can use of its device; None if unknown.
        named: the device of --for_device; None for those of this launch.
    """

    device: torch.device
    processes: int
    dtype: torch.dtype
    memory: int | None
    named: Device | None = None

    def overhead(self, *, sharded: bool) -> int:
        """See `dptune.pass_overhead`."""
        return pass_overhead(accelerator=computes_apart(self.device), sharded=sharded)

    def describe(self, *, sharded: bool) -> list[str]:
        """Printed lines: the devices, the sharding and the precision. Of this launch's, only what is unexpected."""
        if self.named is None:
            return describe_precision(self.dtype, self.device)
        how = "weights sharded over them" if sharded else "each with all weights"
        if self.processes == 1:
            how = "weights sharded, over one device" if sharded else "with all weights"
        asked = precision_of_launch()
        told = f"{_NAMES[self.dtype]}: mixed_precision {asked or 'no'} of the launch configuration"
        if asked is None:
            told = f"{_NAMES[self.dtype]}, without a launch configuration; {PLAIN_CONFIG} has bf16"
        if self.dtype == torch.bfloat16 and not self.named.has_bfloat16:
            told += f"; {self.named.name} has no bfloat16: launch with --mixed_precision fp16, which takes as much"
        return [
            f"planned for            {self.processes} x {self.named.name} ({self.named.memory / 2**30:.2f} GiB), {how}",
            f"precision              {told}",
        ]


def target_of(planning: PlanningArguments, accelerator: Accelerator) -> Target:
    """The devices that the flags ask for.

    Raises:
        InvalidArgument: the launch's `mixed_precision` is none that a run can have.
    """
    named = planning.device
    if named is None:
        dtype = compute_dtype(accelerator.mixed_precision, accelerator.device)
        return Target(accelerator.device, accelerator.num_processes, dtype, device_memory(accelerator.device))
    processes = planning.for_devices or accelerator.num_processes
    dtype = compute_dtype(precision_of_launch() or "no", _OTHER_DEVICE)
    return Target(_OTHER_DEVICE, processes, dtype, named.memory, named)


def target_without_launch(named: Device | None, processes: int) -> Target:
    """The devices of a plan that no launch configuration belongs to.

    Args:
        named: the device, which computes in bfloat16 if it can, else in float16; None for a CPU, in float32, of which
            the memory is unknown.
        processes: how many of them.
    """
    if named is None:
        return Target(torch.device("cpu"), processes, torch.float32, None)
    dtype = torch.bfloat16 if named.has_bfloat16 else torch.float16
    return Target(_OTHER_DEVICE, processes, dtype, named.memory, named)
