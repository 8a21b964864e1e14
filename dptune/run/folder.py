"""How to tell that a folder already holds a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dptune._validate import refuse
from dptune.adapter_files import WEIGHTS_NAME
from dptune.ledger import LEDGER_NAME, has_begun
from dptune.published import PUBLISH_NAME
from dptune.report.statement import REPORT_NAME

_OF_OLD_RUNS = (REPORT_NAME, WEIGHTS_NAME)  # before there was a folder to publish


def refuse_existing_run(run_folder: Path, also: Iterable[str] = ()) -> None:
    """Refuse a folder that holds a run, because a ledger and its trained weights belong together.

    Args:
        run_folder: may be missing.
        also: names of further files and folders that the caller's runs write.

    Raises:
        InvalidArgument: the folder has a ledger with entries, a folder to publish, files of an older version, or one of
            `also`.
    """
    there = [LEDGER_NAME] if has_begun(run_folder / LEDGER_NAME) else []
    there += [name for name in (PUBLISH_NAME, *_OF_OLD_RUNS, *also) if (run_folder / name).exists()]
    if there:
        refuse("run_folder", str(run_folder), f"holds a run already ({there[0]}); give another folder or move it away")
