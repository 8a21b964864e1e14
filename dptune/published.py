"""The part of a run's folder that may be published, and how readers find it there.

A finished run keeps everything that may be published in `<run>/publish`, and nothing else there. The other files of a
run lie beside that folder: checkpoints, diagnostics, and settings with the user's paths.
"""

from __future__ import annotations

import os
from pathlib import Path

PUBLISH_NAME = "publish"
SETTINGS_NAME = "dptune_settings.json"  # what a reader needs to know of the training: the prompt style, for example
CANARIES_SETTING = "audit_canaries"  # in that file: how many rows of random text were learned for an audit


def published_part(path: str | os.PathLike[str]) -> Path:
    """The folder `publish` of a run's folder; `path` itself if that is not the folder of a finished run.

    So a reader takes `OUT`, `OUT/publish` and every other path alike.
    """
    inside = Path(path) / PUBLISH_NAME
    return inside if inside.is_dir() else Path(path)


def published_model(name: str) -> str:
    """`name`, or the folder of the whole model that it holds if it is the folder of a finished run."""
    inside = Path(name) / PUBLISH_NAME
    return str(inside) if (inside / "config.json").is_file() else name
