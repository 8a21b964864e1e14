"""Experiment trackers (`--report_to`), started through accelerate, and kept from seeing any token.

What a tracker gets is not private, and some send it to another machine: that is said once when they start, and nothing
is tracked unless the user named a tracker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from dptune._validate import InvalidArgument, refuse

TRACKERS = ("wandb", "tensorboard", "trackio")
REPORT_TO_CHOICES = (*TRACKERS, "all", "none")

_FLAG = "--report_to"
_SECRET_KEYS = ("token", "secret", "password", "api_key")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def check_report_to(report_to: str | None) -> list[str]:
    """The trackers that `--report_to` asks for, all of them installed.

    Args:
        report_to: one of `REPORT_TO_CHOICES`; "all" is every installed one of `TRACKERS`. None, as with
            `--with_tracking` alone, and "none" keep metrics in local files and give an empty list.

    Raises:
        InvalidArgument: no such tracker, or one whose package is missing.
    """
    if report_to in (None, "none"):
        return []
    if report_to not in REPORT_TO_CHOICES:
        refuse(_FLAG, report_to, f"give one of {', '.join(REPORT_TO_CHOICES)}")
    installed = {str(tracker) for tracker in get_available_trackers()}
    names = [name for name in TRACKERS if name in installed and report_to in (name, "all")]
    if not names:
        package = "wandb" if report_to == "all" else report_to
        refuse(_FLAG, report_to, f"no such tracker is installed; pip install {package}, or leave {_FLAG} out")
    return names


def start_trackers(
    accelerator: Accelerator,
    report_to: str | None,
    project: str,
    config: Mapping[str, Any],
    *,
    logging_dir: str | os.PathLike[str],
) -> None:
    """Start what `--report_to` asks for; afterwards `accelerator.log(values, step)` reaches it.

    Args:
        accelerator: this process's; all ranks call this.
        report_to: see `check_report_to`.
        project: name under which a tracker files the run.
        config: settings to show beside the curves; tokens are taken out.
        logging_dir: folder for the trackers' own files, which are as little private as the diagnostics.

    Raises:
        InvalidArgument: a tracker that is missing, or that does not start.
    """
    names = check_report_to(report_to)
    if not names:
        return
    folder = Path(logging_dir)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.log_with = names
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.print(
        f"{_FLAG} {report_to}: {', '.join(names)} will receive losses, gradient norms and clipped fractions, which are "
        "NOT private and may leave this machine; the privacy guarantee does not cover them."
    )
    try:
        accelerator.init_trackers(project, public_settings(config), _init_kwargs(names, folder))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = f"could not be started ({reason}); set the tracker up, or leave {_FLAG} out"
        raise InvalidArgument(_FLAG, report_to, remedy) from error


def public_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` flattened to scalars, as TensorBoard wants it, without entries named like a secret.

    A secret's value is also blotted out wherever else it stands, and so are the tokens in the environment.
    """
    flat = dict(_flatten(config))
    hidden = {str(value) for key, value in flat.items() if _is_secret(key) and value is not None}
    hidden |= {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    return {key: _blot(value, hidden - {""}) for key, value in flat.items() if not _is_secret(key)}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_secret(key: str) -> bool:
    return key.lower().endswith(_SECRET_KEYS)


def _blot(value: Any, hidden: set[str]) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for secret in hidden:
        text = text.replace(secret, "***")
    return text


def _init_kwargs(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Settings that keep trackers from collecting more than they are given.

    wandb's metadata hold the command line, `--access_token` included, and its console capture whatever is printed.
    trackio makes a public page when it is told to use a hosted one.
    """
    kwargs: dict[str, dict[str, Any]] = {
        "wandb": {
            "dir": str(folder),
            "settings": {"x_disable_meta": True, "console": "off"},
        },
        "trackio": {"private": True},
    }
    return {name: kwargs[name] for name in names if name in kwargs}
