"""Flags: exactly one of noise multiplier and target epsilon, values in range, all read by transformers' parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from dptune import InvalidArgument
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


def test_the_parser_of_transformers_reads_them(tmp_path: Path) -> None:
    flags = f"--output_dir {tmp_path} --target_epsilon 8 --per_sample_max_grad_norm 0.1 --dry_run --use_cpu".split()
    args, privacy = HfArgumentParser((TrainingArguments, PrivacyArguments)).parse_args_into_dataclasses(flags)
    assert (args.dry_run, args.max_grad_norm) == (True, 0.0)
    assert (privacy.target_epsilon, privacy.noise_multiplier, privacy.target_delta) == (8.0, None, 1e-7)
