"""How to tell that a folder already holds a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dptune._validate import refuse
from dptune.adapter_files import WEIGHTS_NAME
from dptune.ledger import has_begun
from dptune.report.statement import REPORT_NAME
from dptune.run.checkpoint import LEDGER_NAME


def refuse_existing_run(run_folder: Path, also: Iterable[str] = ()) -> None:
    """Refuse a folder that holds a run, because a ledger and its trained weights belong together.

    Args:
        run_folder: may be missing.
        also: names of further files and folders that the caller's runs write.

    Raises:
        InvalidArgument: the folder has a ledger with entries, a report, an adapter or one of `also`.
    """
    there = [LEDGER_NAME] if has_begun(run_folder / LEDGER_NAME) else []
    there += [name for name in (REPORT_NAME, WEIGHTS_NAME, *also) if (run_folder / name).exists()]
    if there:
        refuse("run_folder", str(run_folder), f"holds a run already ({there[0]}); give another folder or move it away")
