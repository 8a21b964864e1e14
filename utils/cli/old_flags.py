"""Flags of older transformers releases: what has one new name is renamed, what has none is refused with what to do."""

from __future__ import annotations

from collections.abc import Container, Sequence

from dptune._validate import refuse

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",  # which takes a share of all steps since it takes numbers below 1
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "xpu_backend": "ddp_backend",
    "activation_checkpointing": "gradient_checkpointing",  # the other way round: a new name on an older release
    "gradient_checkpointing": "activation_checkpointing",
}
WITHOUT_SUCCESSOR = {
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead",
    "overwrite_output_dir": "leave it out: a folder that holds a run is never overwritten",
    "group_by_length": "leave it out: batches are Poisson draws",
    "adafactor": "give --optim adafactor",
    "fp16_backend": "leave it out",
    "half_precision_backend": "leave it out",
    "save_safetensors": "leave it out: weights are always saved so",
    "include_inputs_for_metrics": "give --include_for_metrics inputs",
    "use_mps_device": "leave it out: a device that is there is used",
}


def with_new_names(line: Sequence[str], known: Container[str]) -> tuple[list[str], list[str]]:
    """(the command line with new names, a note for each that was changed).

    Args:
        line: words of a command line.
        known: names of all flags that the installed transformers and the script have; those stay as they are.

    Raises:
        InvalidArgument: an old flag without a successor, or a flag by both of its names.

    >>> with_new_names(["--no_cuda"], {"use_cpu"})
    (['--use_cpu'], ['--no_cuda is called --use_cpu now'])
    """
    given = {_name(word) for word in line if word.startswith("--")}
    words, notes = [], []
    for word in line:
        old = _name(word) if word.startswith("--") else ""
        if old in known or old not in RENAMED | WITHOUT_SUCCESSOR:
            words.append(word)
            continue
        if old in WITHOUT_SUCCESSOR:
            refuse(f"--{old}", "given", f"transformers has it no more; {WITHOUT_SUCCESSOR[old]}")
        new = RENAMED[old]
        if new in given:
            refuse(f"--{old}", "given", f"is the old name of --{new}, which is given too; leave it out")
        words.append(f"--{new}" + word[2 + len(old) :])
        notes.append(f"--{old} is called --{new} now")
    return words, notes


def _name(word: str) -> str:
    """Of the flag that a word gives, spelt with underscores."""
    return word[2:].partition("=")[0].replace("-", "_")
