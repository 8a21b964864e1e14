"""A Trainer's flags are all read by transformers' parser."""

from __future__ import annotations

from pathlib import Path

from transformers import HfArgumentParser

from dptune.integrations.transformers import PrivacyArguments, TrainingArguments


def test_the_parser_of_transformers_reads_them(tmp_path: Path) -> None:
    flags = f"--output_dir {tmp_path} --target_epsilon 8 --clip_norm 0.1 --dry_run --use_cpu".split()
    args, privacy = HfArgumentParser((TrainingArguments, PrivacyArguments)).parse_args_into_dataclasses(flags)
    assert (args.dry_run, args.max_grad_norm) == (True, 0.0)
    assert (privacy.target_epsilon, privacy.noise_multiplier, privacy.delta) == (8.0, None, None)
