"""Devices by name: known ones with what their drivers report, others with the memory that the user gives."""

from __future__ import annotations

import re

import pytest

from dptune._validate import InvalidArgument
from utils.models.known_devices import KNOWN, Device, find_device


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("H100 80GB", "H100 80GB"),
        ("h100", "H100 80GB"),
        ("NVIDIA A100-80GB", "A100 80GB"),
        ("nvidia l40s", "L40S 48GB"),
        ("L4", "L4 24GB"),
        ("GeForce RTX 4090", "RTX 4090 24GB"),
        ("Tesla T4", "T4 16GB"),
        ("AMD Instinct MI300X", "MI300X 192GB"),
        ("V100 32 GB", "V100 32GB"),
    ],
)
def test_a_known_device_is_found_however_it_is_written(given: str, name: str) -> None:
    assert find_device(given).name == name


@pytest.mark.parametrize("device", KNOWN, ids=lambda one: one.name)
def test_a_driver_reports_about_the_memory_of_the_name(device: Device) -> None:
    """At least the decimal gigabytes, at most the binary ones: a mistyped figure is neither."""
    (number,) = re.findall(r"(\d+)GB", device.name)
    assert int(number) * 10**9 <= device.memory <= int(number) << 30


def test_only_volta_and_turing_have_no_bfloat16() -> None:
    assert {one.name for one in KNOWN if not one.has_bfloat16} == {"V100 16GB", "V100 32GB", "T4 16GB"}
    assert not find_device("Tesla T4 15GB").has_bfloat16
    assert find_device("A10 24GB").has_bfloat16


@pytest.mark.parametrize(
    ("given", "size"),
    [("24GB", 24 * 10**9), ("my card 24GB", 24 * 10**9), ("A10 22.5 GiB", 45 << 29), ("H100 96gb", 96 * 10**9)],
)
def test_another_device_has_the_memory_that_is_given(given: str, size: int) -> None:
    found = find_device(given)
    assert (found.name, found.memory) == (given, size)


def test_a_known_device_of_another_size_computes_as_the_known_one() -> None:
    assert find_device("H100 96gb") == Device("H100 96gb", 96 * 10**9, peak=find_device("h100").peak)
    assert find_device("my card 24GB") == Device("my card 24GB", 24 * 10**9)


def test_every_known_device_has_a_peak_of_some_teraflops() -> None:
    assert all(one.peak is not None and 50e12 < one.peak < 2e15 for one in KNOWN)


@pytest.mark.parametrize("given", ["H1000", "", "GB", "0GB", "nvidia"])
def test_an_unknown_device_is_refused_with_the_known_ones(given: str) -> None:
    with pytest.raises(
        InvalidArgument, match=f"^--for_device='{given}': give one of A100 40GB, .*MI300X 192GB, or any"
    ):
        find_device(given)


def test_a_device_with_two_sizes_needs_its_memory() -> None:
    with pytest.raises(InvalidArgument, match=r"^--for_device='a100': there are several; give A100 40GB or A100 80GB"):
        find_device("a100")
