"""The flags of a proposal as words, as train_clm.py reads them, and as a line for a shell."""

from __future__ import annotations

import shlex

import pytest

from dptune._validate import InvalidArgument
from utils.models.known_devices import find_device
from utils.planning.flags import as_groups, as_words, trained_flags, training_line
from utils.training.lora_arguments import LoraArguments

VALUES = {
    "model_name_or_path": "my model",
    "train_file": ["a.jsonl", "b.jsonl"],
    "output_dir": "out",
    "learning_rate": 1.25e-3,
    "target_epsilon": 3.0,
    "gradient_ckpt": True,
}


def test_values_become_words_that_the_program_reads() -> None:
    words = as_words(VALUES)
    assert words[:5] == ["--model_name_or_path", "my model", "--train_file", "a.jsonl", "b.jsonl"]
    groups = as_groups(VALUES)
    assert (groups.optimization.learning_rate, groups.optimization.gradient_ckpt) == (1.25e-3, True)
    assert groups.data.train_file == ["a.jsonl", "b.jsonl"]
    with pytest.raises(InvalidArgument, match=r"^--learning_rate=0.0: give a finite number above 0"):
        as_groups(VALUES | {"learning_rate": 0.0})


def test_only_what_a_run_reads_of_what_is_trained_is_stated() -> None:
    assert trained_flags(LoraArguments()) == {"lora_r": 16, "lora_alpha": 16.0}
    given = LoraArguments(lora_target_modules=["c_attn"], use_rslora=True)
    assert trained_flags(given).keys() == {"lora_r", "lora_alpha", "lora_target_modules", "use_rslora"}
    assert trained_flags(LoraArguments(trainable=["*.attn.*"], lora_r=4)) == {"trainable": ["*.attn.*"]}
    assert trained_flags(LoraArguments(initial_adapter="old", lora_r=4)) == {"initial_adapter": "old"}


def test_the_line_is_quoted_and_launches_what_the_device_needs() -> None:
    alone = training_line(VALUES, None, 1, shard=False)
    assert shlex.split(alone) == ["python", "train_clm.py", *as_words(VALUES)]
    assert "'my model'" in alone
    several = shlex.split(training_line(VALUES, find_device("H100"), 4, shard=False))
    assert several[:7] == [
        *("accelerate", "launch", "--config_file", "accelerate_configs/accelerate_config_nofsdp.cfg"),
        *("--num_processes", "4", "--multi_gpu"),
    ]
    sharded = training_line(VALUES, find_device("T4"), 2, shard=True)
    assert sharded.startswith(
        "accelerate launch --mixed_precision fp16 --config_file accelerate_configs/accelerate_con"
    )
    assert "accelerate_config.cfg --num_processes 2 train_clm.py" in sharded
