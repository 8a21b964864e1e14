"""Lines of flags of train_classifier.py, and the settings that they are parsed to."""

from __future__ import annotations

from pathlib import Path

from utils.classification.arguments import CLASSIFIER_GROUPS, Settings
from utils.cli.flags import parse

# A run of --finetune_mode lora with privacy.
PRIVATE: dict[str, object] = {"finetune_mode": "lora", "enable_dp": True, "clip_norm": 1, "noise_multiplier": 1}


def settings(*flags: str, datasets: tuple[str, ...] = ("--datasets", "sst2")) -> Settings:
    """All groups for a line; `datasets` holds the flags that say which data it trains on."""
    return Settings(*parse(*CLASSIFIER_GROUPS, args=[*datasets, *flags]))


def flags(checkpoint: Path, data: Path, out: Path, **changes: object) -> list[str]:
    """A run of two steps, with flags changed, added (True: without a value), or left out (None)."""
    settings: dict[str, object] = {
        "model_name_or_path": checkpoint,
        "datasets": "sst2",
        "data_dir": data,
        "output_dir": out,
        "block_size": 16,
        "batch_size": 24,
        "micro_batch_size": 8,
        "num_train_epochs": 0.4,
        "delta": 1e-3 if changes.get("enable_dp") else None,
        "num_prepend_tokens": 3,
        "lora_r": 2,
    } | changes
    chosen = {name: value for name, value in settings.items() if value is not None}
    return [
        word
        for name, value in chosen.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", *str(value).split()])
    ]
