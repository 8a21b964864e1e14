"""The prompt style that sampling uses: that of the training, unless another one is asked for."""

from __future__ import annotations

from pathlib import Path

from utils.data.prompts import PLAIN, PROMPT_STYLE_OF_ROWS, PROMPT_STYLES
from utils.files.folders import recorded_by_training


def style_of_training(trained: str | Path) -> str | None:
    """The prompt style that the rows of a training had; None if it is unknown.

    Args:
        trained: what the training left: an adapter's file or folder, a checkpoint, or the folder of a whole model.
    """
    found = recorded_by_training(trained, PROMPT_STYLE_OF_ROWS)
    return next((str(style) for style in found if style in PROMPT_STYLES), None)


def chosen_style(asked: str | None, trained: str | Path) -> tuple[str, list[str]]:
    """(the prompt style to use, lines for the user).

    Args:
        asked: the value of --prompt_style, if it was given.
        trained: see `style_of_training`.

    >>> chosen_style(None, "an/adapter/of/another/tool")
    ('plain', [])
    """
    found = style_of_training(trained)
    if asked is None:
        return (PLAIN, []) if found is None else (found, [f"prompt style           {found}, as in training"])
    if found in (None, asked):
        return asked, []
    told = f"--prompt_style {asked} is not that of the training; texts may be poor, so leave it out to use {found}"
    return asked, [f"warning: {told}"]
