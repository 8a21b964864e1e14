r"""Verify what a run published, from the published files alone.

    python -m dptune.verify OUT

Epsilon is computed again from the ledger and compared with the report and the model card. Every figure of the card's
table must follow from the report. Every file must be the one that the run left (SHA256SUMS), and nothing else may lie
in the folder. The exit status is 0 if all of that holds, and 2 with one line about what does not. A model without a
guarantee is refused, unless --without_privacy allows it.

Who made the folder can have written all of it, the ledger too: this finds errors and tampering by others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import InvalidArgument, refuse
from dptune._words import counted
from dptune.accounting.rounding import rounded_up
from dptune.published import published_part

if TYPE_CHECKING:
    from dptune.report.statement import PrivacyStatement


def verify(path: str | Path, *, without_privacy: bool = False) -> list[str]:
    """Verify a folder, and return printable lines about what holds.

    Args:
        path: the folder `publish` of a run, the run's folder, or a download of what was published.
        without_privacy: whether to take a model that states no guarantee.

    Raises:
        InvalidArgument: something does not hold. One line names the file and the remedy.
    """
    lines = _what_holds(path, without_privacy=without_privacy)
    _require_no_paths(path)
    return lines


def _what_holds(path: str | Path, *, without_privacy: bool) -> list[str]:
    """The lines of `verify`, whatever paths are named."""
    from dptune.report.check import check_publishable  # torch: not while flags are parsed
    from dptune.report.checksums import require_checksums

    folder = published_part(path)
    if not folder.is_dir():
        refuse("FOLDER", str(path), "is no folder; give the folder publish of a finished run")
    statement = check_publishable(folder, paths=False)
    if statement.epsilon is None and not without_privacy:
        remedy = f"states no guarantee ({statement.reasons[0]}); give --without_privacy to verify the rest"
        refuse("FOLDER", str(path), remedy)
    files = f"files                  {len(require_checksums(folder))} as the run left them; nothing else lies there"
    return [*_guarantee(statement), files, *_versions(statement)]


def _require_no_paths(path: str | Path) -> None:
    from dptune.report.check import require_no_paths

    require_no_paths(published_part(path))


def _guarantee(statement: PrivacyStatement) -> list[str]:
    if statement.epsilon is None:
        return [f"privacy                NONE: {'; '.join(statement.reasons)}"]
    steps = counted(statement.steps, "step") + (
        f" and {statement.unused_steps:,} unused" if statement.unused_steps else ""
    )
    return [
        f"privacy                epsilon {rounded_up(statement.epsilon)} at delta {statement.delta:g}, for "
        f"{statement.privacy_unit}",
        f"ledger                 {steps}: the same epsilon, computed again",
        "report and card        agree with the ledger",
        *(f"starts from            {one.name}, whose epsilon adds up" for one in statement.starts_from),
    ]


def _versions(statement: PrivacyStatement) -> list[str]:
    """A line if another version of the accountant computed the stated epsilon."""
    stated, here = statement.versions.get("dp-accounting"), metadata.version("dp-accounting")
    return [] if stated == here else [f"accountant             dp-accounting {stated} then, {here} here"]


def main(argv: Sequence[str] | None = None) -> None:
    """Verify the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder publish of a run, or the run's folder")
    parser.add_argument("--without_privacy", action="store_true", help="take a model that states no guarantee")
    given = parser.parse_args(argv)
    try:
        print(*_what_holds(given.folder, without_privacy=given.without_privacy), sep="\n", flush=True)
        _require_no_paths(given.folder)  # last, because the guarantee holds all the same
        print("verified")
    except InvalidArgument as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
