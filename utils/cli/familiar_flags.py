"""What other tools call a flag, for hints: PEFT, TRL, transformers, LLaMA-Factory, Opacus' examples, dp-transformers.

A name may stand for several flags: a program hints at the first one that it has.
"""

from __future__ import annotations

# {flag here: what others call it}
_CALLED = {
    "block_size": ("sequence_len", "seq_len", "max_seq_len", "max_seq_length", "max_length", "cutoff_len"),
    "max_length": ("max_seq_len", "max_seq_length", "max_new_tokens"),
    "clip_norm": ("max_grad_norm", "per_sample_max_grad_norm", "clip", "max_clip_norm", "l2_norm_clip"),
    "max_grad_norm": ("clip_norm", "per_sample_max_grad_norm", "clip"),
    "target_epsilon": ("eps", "epsilon", "privacy_budget"),
    "noise_multiplier": ("sigma", "noise", "noise_scale"),
    "delta": ("target_delta",),
    "lora_r": ("lora_dim", "lora_rank", "rank", "r"),
    "lora_target_modules": ("target_modules", "lora_target"),
    "per_device_train_batch_size": ("batch_size", "micro_batch_size", "per_gpu_train_batch_size", "train_batch_size"),
    "gradient_ckpt": ("gradient_checkpointing", "activation_checkpointing"),
    "learning_rate": ("lr",),
    "num_train_epochs": ("epochs", "num_epochs"),
    "max_train_steps": ("max_steps", "steps", "num_steps"),
    "num_warmup_steps": ("warmup_steps", "warmup_ratio"),
    "lr_scheduler_type": ("scheduler", "lr_scheduler"),
    "eval_freq": ("eval_steps", "eval_strategy", "evaluation_strategy", "logging_steps"),
    "checkpointing_steps": ("save_steps", "save_strategy", "save_freq"),
    "train_file": ("dataset", "dataset_path", "data", "data_path", "train_data"),
    "train_file_weights": ("interleave_probs", "dataset_weights", "data_weights", "mixture_weights"),
    "validation_file": ("eval_file", "eval_data", "eval_dataset", "validation_data", "val_file"),
    "text_column": ("dataset_text_field", "text_field"),
    "model_name_or_path": ("model", "model_name", "base_model", "model_path"),
    "model_checkpoint": ("model", "model_name", "model_name_or_path", "base_model"),
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
