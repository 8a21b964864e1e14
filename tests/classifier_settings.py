"""The flags of a line of train_classifier.py, parsed."""

from __future__ import annotations

from utils.classification.arguments import CLASSIFIER_GROUPS, Settings
from utils.cli.flags import parse


def settings(*flags: str, datasets: tuple[str, ...] = ("--datasets", "sst2")) -> Settings:
    """All groups for a line; `datasets` holds the flags that say which data it trains on."""
    return Settings(*parse(*CLASSIFIER_GROUPS, args=[*datasets, *flags]))
