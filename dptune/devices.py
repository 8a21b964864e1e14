"""What depends on the kind of a device, in one place. AMD's GPUs are CUDA to torch, Intel's are XPU, Apple's MPS."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

_CANNOT_PIN = ("cpu", "meta", "mps")
_FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # elsewhere torch emulates its products


def has_accelerator() -> bool:
    """Whether the machine has one that a private step can use. Apple's has no float64, in which gradients are added."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones (AVX512-BF16 or AMX)."""
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in _FAST_BFLOAT16)


def restored_randomness(device: torch.device | None = None) -> AbstractContextManager[None]:
    """Restore the states of torch's random numbers after the block: the CPU's, and those of `device`.

    Args:
        device: None for the machine's accelerator, if there is one. `torch.manual_seed` seeds it too.
    """
    device = device or torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def can_pin(device: torch.device) -> bool:
    """Whether copies to `device` are faster from pinned memory of the CPU."""
    return device.type not in _CANNOT_PIN


def computes_apart(device: torch.device) -> bool:
    """Whether the CPU has time for other work while `device` computes."""
    return device.type not in ("cpu", "meta")
