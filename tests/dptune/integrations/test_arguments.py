"""Flags: exactly one of noise multiplier and target epsilon, values in range, all read by transformers' parser."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from dptune import InvalidArgument
from dptune.integrations.arguments import ONLY_PRIVATE
from dptune.integrations.transformers import PrivacyArguments, TrainingArguments


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "--noise_multiplier"),
        ({"noise_multiplier": 1.0, "target_epsilon": 8.0}, "--target_epsilon"),
        ({"noise_multiplier": 0.0}, "--noise_multiplier"),
        ({"target_epsilon": -1.0}, "--target_epsilon"),
        ({"target_epsilon": 1.0, "per_sample_max_grad_norm": 0.0}, "--per_sample_max_grad_norm"),
        ({"target_epsilon": 1.0, "target_delta": 1.0}, "--target_delta"),
    ],
)
def test_a_wrong_value_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        PrivacyArguments(**given)


def test_without_privacy_no_noise_need_be_named() -> None:
    assert PrivacyArguments(disable_dp=True).noise_multiplier is None


@pytest.mark.parametrize("name", [one.name for one in fields(PrivacyArguments)])
def test_each_setting_is_read_without_privacy_or_refused(name: str) -> None:
    read = {"disable_dp", "insecure_test_seed"}  # the seed of the draws, which stay
    assert (name in ONLY_PRIVATE) != (name in read)
    given: dict[str, Any] = {name: 0.25}
    if name in ONLY_PRIVATE:
        with pytest.raises(InvalidArgument, match=f"^--{name}=0.25: is not read with --disable_dp"):
            PrivacyArguments(disable_dp=True, **given)
    else:
        PrivacyArguments(**({"disable_dp": True} | given))


def test_the_parser_of_transformers_reads_them(tmp_path: Path) -> None:
    flags = f"--output_dir {tmp_path} --target_epsilon 8 --per_sample_max_grad_norm 0.1 --dry_run --use_cpu".split()
    args, privacy = HfArgumentParser((TrainingArguments, PrivacyArguments)).parse_args_into_dataclasses(flags)
    assert (args.dry_run, args.max_grad_norm) == (True, 0.0)
    assert (privacy.target_epsilon, privacy.noise_multiplier, privacy.target_delta) == (8.0, None, 1e-7)
