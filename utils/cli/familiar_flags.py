"""What other tools call a flag, for hints: PEFT, TRL, transformers, LLaMA-Factory, Opacus' examples, dp-transformers.

A name may stand for several flags: a program hints at the first one that it has.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# {flag of another tool that is deliberately missing: why}
_MISSING = {
    **dict.fromkeys(
        ("deepspeed", "deepspeed_config", "zero_stage"),
        "DeepSpeed adds up gradients itself, before each example's part of them is clipped; to shard a model, launch "
        "with accelerate_configs/accelerate_config.cfg (FSDP2)",
    ),
    **dict.fromkeys(
        ("torch_compile", "torch_compile_mode", "torch_compile_backend"),
        "per-example gradients are recorded by hooks on layers, which do not run in a compiled model; leave it out",
    ),
    **dict.fromkeys(
        ("neftune_noise_alpha", "noisy_embedding_alpha"),
        "not built in. NEFTune's noise protects nobody, and its scale follows the longest row of a micro-batch, so it "
        "would couple examples; leave it out",
    ),
}
# {flag here: what others call it}
_CALLED = {
    "block_size": ("sequence_len", "seq_len", "max_seq_len", "max_seq_length", "max_length", "cutoff_len"),
    "max_length": ("max_seq_len", "max_seq_length", "max_new_tokens"),
    "clip_norm": ("max_grad_norm", "per_sample_max_grad_norm", "clip", "max_clip_norm", "l2_norm_clip"),
    "target_epsilon": ("eps", "epsilon", "privacy_budget"),
    "noise_multiplier": ("sigma", "noise", "noise_scale"),
    "delta": ("target_delta",),
    "initial_adapter": ("adapter_name_or_path", "peft_model_id", "lora_model_dir"),
    "use_rslora": ("rslora",),
    "lora_r": ("lora_dim", "lora_rank", "rank", "r"),
    "lora_target_modules": ("target_modules", "lora_target"),
    "per_device_train_batch_size": ("batch_size", "micro_batch_size", "per_gpu_train_batch_size", "train_batch_size"),
    "gradient_ckpt": ("gradient_checkpointing", "activation_checkpointing"),
    "learning_rate": ("lr",),
    "num_train_epochs": ("epochs", "num_epochs"),
    "max_train_steps": ("max_steps", "steps", "num_steps"),
    "num_warmup_steps": ("warmup_steps",),
    "optimizer": ("optim",),
    "attn_implementation": ("attn_impl", "flash_attention", "flash_attn", "sdp_attention"),
    "load_best_model": ("load_best_model_at_end",),
    "early_stopping_patience": ("early_stopping",),
    "sample_every": ("sample_steps", "generate_every"),
    "ema": ("ema_decay", "use_ema", "ema_rate"),
    "average_last": ("swa", "swa_start", "average_weights"),
    "lr_scheduler_type": ("scheduler", "lr_scheduler"),
    "eval_freq": ("eval_steps", "eval_strategy", "evaluation_strategy", "logging_steps"),
    "checkpointing_steps": ("save_steps", "save_strategy", "save_freq"),
    "train_file": ("dataset", "dataset_path", "data", "data_path", "train_data"),
    "train_file_weights": ("interleave_probs", "dataset_weights", "data_weights", "mixture_weights"),
    "validation_file": ("eval_file", "eval_data", "eval_dataset", "validation_data", "val_file"),
    "text_column": ("dataset_text_field", "text_field"),
    "model_name_or_path": ("model", "model_name", "model_checkpoint", "base_model", "model_path"),
    "lora_weights_path": ("adapter", "adapter_path", "lora_path", "peft_model"),
    "output_dir": ("out", "out_dir", "output", "output_path"),
    "qbits": ("load_in_4bit", "load_in_8bit", "quantization_bit", "bits"),
    "prompt_style": ("template", "chat_template", "prompt_template"),
    "privacy_unit": ("user_column", "author_column", "unit"),
    "resume_from_checkpoint": ("resume", "resume_from"),
    "access_token": ("hf_token", "token", "use_auth_token"),
}


def names_here(other: str) -> list[str]:
    """The flags that another tool's name may stand for, without hyphens before it.

    >>> names_here("lora-rank"), names_here("evaluation_strategy"), names_here("colour")
    (['lora_r'], ['eval_freq'], [])
    """
    name = other.replace("-", "_").lower()
    return [flag for flag, called in _CALLED.items() if name in called]


def nearest_flag(flag: str, own: Sequence[str]) -> str | None:
    """The flag that another tool calls so, or the one that is spelt most like it; None if there is none.

    Args:
        flag: an unknown flag, with hyphens before it.
        own: the program's flags, in each spelling.
    """
    named = [f"--{name}" for name in names_here(flag.removeprefix("--"))]
    close = [one for one in named if one in own] or difflib.get_close_matches(flag, own, n=1)
    return next(iter(close), None)


def why_missing(other: str) -> str | None:
    """Why a flag of another tool is deliberately missing in every program here; None if it is not.

    >>> why_missing("colour"), why_missing("torch-compile").partition(",")[0]
    (None, 'per-example gradients are recorded by hooks on layers')
    """
    return _MISSING.get(other.replace("-", "_").lower())
