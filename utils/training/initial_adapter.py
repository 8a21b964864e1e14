"""`--initial_adapter`: the adapter that a run starts from, and whether its own guarantee allows a private run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dptune._validate import refuse, renamed
from dptune.accounting.rounding import rounded_up
from dptune.published import PUBLISH_NAME
from dptune.report.card import published_name
from dptune.report.prior import PriorRelease, read_priors
from dptune.report.statement import REPORT_NAME
from utils.models.loading import adapter_files
from utils.training.lora_arguments import LoraArguments

FLAG, PUBLIC_FLAG = "--initial_adapter", "--initial_adapter_is_public"


def initial_releases(lora: LoraArguments, *, private: bool) -> tuple[PriorRelease, ...]:
    """The release that a run starts from, and those before it; empty if adapters start anew.

    Args:
        lora: the flags.
        private: whether the run is to have a guarantee.

    Raises:
        InvalidArgument: there is no adapter; its report is damaged; or a private run would start from one without a
            guarantee that is not declared public.
    """
    given = lora.initial_adapter
    if given is None:
        return ()
    with renamed({"--lora_weights_path": FLAG, "path": FLAG}):
        files = adapter_files(given)
        folder = Path(given) if Path(given).is_dir() else Path(given).parent
        found = read_priors(
            folder,
            REPORT_NAME,
            name=_name_of(folder),
            sha256=_digest(files),
            declared_public=lora.initial_adapter_is_public,
        )
    if private and found[0].epsilon is None and not lora.initial_adapter_is_public:
        reason = (
            "no privacy report with a guarantee lies beside it, so epsilon would not count what it tells of its data"
        )
        refuse(FLAG, given, f"{reason}; give {PUBLIC_FLAG} if it was trained on public data alone")
    return found


def start_identity(releases: Sequence[PriorRelease]) -> dict[str, Any]:
    """What a resumed run must share of its start, as JSON values."""
    return {"initial_adapter": [asdict(one) for one in releases]} if releases else {}


def describe_start(releases: Sequence[PriorRelease]) -> list[str]:
    """Printed lines about the start."""
    lines = []
    for number, one in enumerate(releases):
        bound = "without a bound of its own" if one.epsilon is None else f"epsilon {rounded_up(one.epsilon)} of its own"
        public = ", declared public" if one.declared_public else ""
        lines.append(f"{'' if number else 'starts from':<22} {one.name}, {bound}{public}")
    return lines


def _name_of(folder: Path) -> str:
    """The name to publish: of the run's folder, not of the folder `publish` in it."""
    folder = folder.resolve()
    return published_name(str(folder.parent if folder.name == PUBLISH_NAME else folder))


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 over the content of files, in the order given."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
