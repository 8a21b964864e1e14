"""Devices that a run can be planned for without having one: memory, peak speed, and whether they compute in bfloat16.

A device of the table has the memory that its driver reports, which is what a process can get at most. For NVIDIA's that
is the total of `nvidia-smi` (data sheets say the GB of the name, and drivers report a little more or less than that in
GiB): A100, H100, L4, L40S and T4 as listed in github.com/modal-labs/modal-client/pull/2797, the others as printed in
users' reports. For MI300X it is the total of `rocm-smi`. Volta and Turing (V100, T4) have no bfloat16 in hardware
(NVIDIA's CUDA C++ Programming Guide: compute capability 8.0 and above).

The peak speed is that of dense matrix products in bfloat16 (float16 for Volta and Turing) with sums in float32. It is
taken from the makers' data sheets, which often print twice as much, for sparse matrices. Where a name stands for
several forms (SXM, PCIe), it is that of the fastest.

No torch in this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dptune._validate import refuse

_MIB, _GIB, _GB = 1 << 20, 1 << 30, 10**9
_TERA = 1e12
_FLAG = "--for_device"
_SIZE = re.compile(r"(?P<name>.*?)\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>GiB|GB|G)", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """A device that computes.

    Attributes:
        name: how the user calls it.
        memory: bytes.
        has_bfloat16: whether it computes in bfloat16.
        peak: floating-point operations per second, a multiplication and an addition being two; None if unknown.
    """

    name: str
    memory: int
    has_bfloat16: bool = True
    peak: float | None = None


KNOWN = (
    Device("A100 40GB", 40_960 * _MIB, peak=312 * _TERA),
    Device("A100 80GB", 81_920 * _MIB, peak=312 * _TERA),
    Device("H100 80GB", 81_559 * _MIB, peak=989 * _TERA),
    Device("H200 141GB", 143_771 * _MIB, peak=989 * _TERA),
    Device("L4 24GB", 23_034 * _MIB, peak=121 * _TERA),
    Device("L40S 48GB", 46_068 * _MIB, peak=362 * _TERA),
    Device("RTX 4090 24GB", 24_564 * _MIB, peak=165 * _TERA),
    Device("V100 16GB", 16_160 * _MIB, has_bfloat16=False, peak=125 * _TERA),
    Device("V100 32GB", 32_510 * _MIB, has_bfloat16=False, peak=125 * _TERA),
    Device("T4 16GB", 15_360 * _MIB, has_bfloat16=False, peak=65 * _TERA),
    Device("MI300X 192GB", 206_141_652_992, peak=1307 * _TERA),
)


def find_device(name: str) -> Device:
    """The device of a name: one of KNOWN, with or without its memory, or any name with a memory, such as "24GB".

    A known name with another memory, such as "T4 15GB", computes as the known one.

    Capitals, spaces, hyphens and the makers' words (NVIDIA, GeForce, Tesla, AMD, Instinct) make no difference. A memory
    beside an unknown name is taken as it stands: 1 GB is 10^9 bytes, 1 GiB is 2^30.

    Raises:
        InvalidArgument: no known device and no memory, or several known ones; the message lists them.
    """
    wanted = _plain(name)
    found = [one for one in KNOWN if wanted in (_plain(one.name), _plain(one.name.rpartition(" ")[0]))]
    if len(found) == 1:
        return found[0]
    if found:
        refuse(_FLAG, name, f"there are several; give {' or '.join(one.name for one in found)}")
    sized = _SIZE.fullmatch(name.strip())
    if sized is None or not (memory := int(float(sized["number"]) * (_GIB if sized["unit"][1:] == "iB" else _GB))):
        known = ", ".join(one.name for one in KNOWN)
        refuse(_FLAG, name, f"give one of {known}, or any name with its memory, such as 'my card 24GB'")
    plain = _plain(sized["name"])
    same = next((one for one in KNOWN if _plain(one.name.rpartition(" ")[0]) == plain), Device(name, memory))
    return replace(same, name=name.strip(), memory=memory)


def _plain(name: str) -> str:
    """A name without what makes no difference."""
    return re.sub(r"nvidia|amd|geforce|tesla|instinct|[\s_-]", "", name.lower())
