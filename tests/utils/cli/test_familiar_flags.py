"""Names that newcomers bring from other tools lead to the flag, before any other mistake is told."""

from __future__ import annotations

import pytest

from utils.cli.familiar_flags import names_here, why_missing
from utils.cli.flags import parse
from utils.training.arguments import CAUSAL_LM_GROUPS


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (["--per_sample_max_grad_norm", "1"], "--clip_norm"),
        (["--eps=8"], "--target_epsilon"),
        (["--lora_rank", "8"], "--lora_r"),
        (["--lora-dim", "8"], "--lora_r"),
        (["--max_seq_length", "512"], "--block_size"),
        (["--evaluation_strategy", "steps"], "--eval_freq"),
        (["--save_steps", "5"], "--checkpointing_steps"),
        (["--gradient_checkpointing", "True"], "--gradient_ckpt"),
        (["--batch_size", "8"], "--per_device_train_batch_size"),
        (["--warmup_steps", "10"], "--num_warmup_steps"),
        (["--optim", "sgd"], "--optimizer"),
        (["--dataset", "rows.jsonl"], "--train_file"),
        (["--sigma", "1"], "--noise_multiplier"),
        (["--num_epochs", "3"], "--num_train_epochs"),
        (["--load_in_4bit", "True"], "--qbits"),
        (["--dataset_text_field", "body"], "--text_column"),
    ],
)
def test_another_tools_name_leads_to_the_flag(given: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line also lacks the noise, which is told only afterwards."""
    with pytest.raises(SystemExit) as ended:
        parse(*CAUSAL_LM_GROUPS, args=["--model_name_or_path", "m", "--output_dir", "o", *given])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: unknown flag: {given[0].partition('=')[0]} (did you mean {flag}?) (--help lists the flags)"


def test_a_hint_is_only_for_a_flag_that_the_program_has() -> None:
    assert names_here("max_seq_len") == ["block_size", "max_length"]
    assert names_here("no_such_name") == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--torch_compile"], "hooks on layers, which do not run in a compiled model"),
        (["--neftune-noise-alpha", "5"], "its scale follows the longest row of a micro-batch"),
        (["--deepspeed", "zero2.json"], "before each example's part of them is clipped"),
    ],
)
def test_a_flag_that_is_deliberately_missing_says_why(
    given: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*CAUSAL_LM_GROUPS, args=["--model_name_or_path", "m", "--output_dir", "o", *given])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {given[0]}: ")
    assert reason in line


def test_other_flags_are_not_deliberately_missing() -> None:
    assert why_missing("colour") is None
    assert why_missing("torch-compile") == why_missing("torch_compile") is not None
