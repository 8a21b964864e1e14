"""Flags of older transformers releases: renamed if they have a new name, otherwise refused with the remedy."""

from __future__ import annotations

from collections.abc import Container, Sequence

from dptune._validate import refuse

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",  # whose values below 1 are a share of all steps
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "xpu_backend": "ddp_backend",
    "activation_checkpointing": "gradient_checkpointing",  # the reverse: a new name on an older release
    "gradient_checkpointing": "activation_checkpointing",
}
WITHOUT_SUCCESSOR = {
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead",
    "overwrite_output_dir": "leave it out: a folder that holds a run is never overwritten",
    "group_by_length": "leave it out: batches are Poisson samples",
    "adafactor": "give --optim adafactor",
    "fp16_backend": "leave it out",
    "half_precision_backend": "leave it out",
    "save_safetensors": "leave it out: weights are always saved as safetensors",
    "include_inputs_for_metrics": "give --include_for_metrics inputs",
    "use_mps_device": "leave it out: an available device is used",
}


def with_new_names(line: Sequence[str], known: Container[str]) -> tuple[list[str], list[str]]:
    """(the command line with new names, a note for each renamed flag).

    Args:
        line: words of a command line.
        known: names of all flags of the installed transformers and the script; those stay unchanged.

    Raises:
        InvalidArgument: a flag has no new name, or is given under both names.

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
            refuse(f"--{old}", "given", f"transformers no longer has it; {WITHOUT_SUCCESSOR[old]}")
        new = RENAMED[old]
        if new in given:
            refuse(f"--{old}", "given", f"is the old name of --{new}, which is also given; leave it out")
        words.append(f"--{new}" + word[2 + len(old) :])
        notes.append(f"--{old} is called --{new} now")
    return words, notes


def _name(word: str) -> str:
    """The name of the flag in a word, with underscores."""
    return word[2:].partition("=")[0].replace("-", "_")
