"""Experiment trackers (`--with_tracking`, `--report_to`), started through accelerate. They never see a token.

What a tracker gets is not private, and some trackers send it to another machine; a message says so when they start.
Without either flag nothing is tracked. The diagnostics file in the output folder is always written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptune._validate import InvalidArgument, refuse

if TYPE_CHECKING:  # for types only: modules of flags import this one without loading accelerate
    from accelerate import Accelerator

TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")
REPORT_TO_CHOICES = (*TRACKERS, "all", "none")
LOCAL = "tensorboard"  # writes files and sends nothing

_FLAG = "--report_to"
_SECRET_KEYS = ("token", "secret", "password", "api_key")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def choose_trackers(report_to: str | None, *, with_tracking: bool = False) -> list[str]:
    """The trackers that the flags ask for; all are installed.

    Args:
        report_to: one of `REPORT_TO_CHOICES`. "all" is every installed one of `TRACKERS`; None and "none" add nothing
            to `with_tracking`.
        with_tracking: write local files (`LOCAL`), independently of `report_to`.

    Raises:
        InvalidArgument: the tracker is unknown, or its package is not installed.
    """
    local = []
    if with_tracking:
        if LOCAL not in _installed():
            refuse("--with_tracking", True, f"needs {LOCAL}; pip install {LOCAL}, or leave --with_tracking out")
        local = [LOCAL]
    return [*local, *(name for name in _reported_to(report_to) if name not in local)]


def _installed() -> set[str]:
    from accelerate.tracking import get_available_trackers

    return {str(tracker) for tracker in get_available_trackers()}


def _reported_to(report_to: str | None) -> list[str]:
    if report_to in (None, "none"):
        return []
    if report_to not in REPORT_TO_CHOICES:
        refuse(_FLAG, report_to, f"give one of {', '.join(REPORT_TO_CHOICES)}")
    installed = _installed()
    names = [name for name in TRACKERS if name in installed and report_to in (name, "all")]
    if not names:
        package = "wandb" if report_to == "all" else report_to
        refuse(_FLAG, report_to, f"no such tracker is installed; pip install {package}, or leave {_FLAG} out")
    return names


def start_trackers(
    accelerator: Accelerator,
    names: Sequence[str],
    project: str,
    config: Mapping[str, Any],
    *,
    logging_dir: str | os.PathLike[str],
) -> None:
    """Start trackers; afterwards `accelerator.log(values, step)` sends to them.

    Args:
        accelerator: this process's accelerator; all ranks call this.
        names: see `choose_trackers`; an empty sequence starts nothing.
        project: the project name for the tracker.
        config: settings to show with the curves; tokens are removed.
        logging_dir: folder for the trackers' own files, which are not private, like the diagnostics.

    Raises:
        InvalidArgument: a tracker is missing or does not start.
    """
    if not names:
        return
    folder, told = Path(logging_dir), ", ".join(names)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.log_with = list(names)
    accelerator.project_configuration.logging_dir = str(folder)
    where = f"stay in {folder}" if list(names) == [LOCAL] else "may leave this machine"
    accelerator.print(
        f"tracking: {told} will receive losses, gradient norms and clipped fractions. These are NOT private and "
        f"{where}; the privacy guarantee does not cover them."
    )
    try:
        accelerator.init_trackers(project, public_settings(config), _init_kwargs(names, folder))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = f"could not be started ({reason}); set the tracker up, or give another {_FLAG}"
        raise InvalidArgument("trackers", told, remedy) from error


def public_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` flattened to scalars, as TensorBoard needs, without entries named like a secret.

    Values of secrets, and tokens in the environment, are also replaced by *** in all other entries.
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


def _init_kwargs(names: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Settings that keep trackers from collecting more than they are given.

    wandb's metadata would include the command line, with `--access_token`; its console capture would include all
    output. trackio would make a hosted page public.
    """
    kwargs: dict[str, dict[str, Any]] = {
        "wandb": {
            "dir": str(folder),
            "settings": {"x_disable_meta": True, "console": "off"},
        },
        "trackio": {"private": True},
    }
    return {name: kwargs[name] for name in names if name in kwargs}
