"""What goes with an adapter that is merged into its base model: merging uses no data, so the guarantee stays."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dptune.ledger import LEDGER_NAME
from dptune.published import SETTINGS_NAME
from dptune.report.card import LORA_ADAPTER, WHOLE_MODEL
from dptune.report.checksums import write_checksums
from dptune.report.publish import CARD_NAME, COMPLETED_BY_PEOPLE, EPSILON_PLOT
from dptune.report.statement import REPORT_NAME, PrivacyStatement, read_privacy_report

_COPIED = (REPORT_NAME, LEDGER_NAME, EPSILON_PLOT, SETTINGS_NAME)
_LOADING = re.compile(r"^## How to load it\n.*?(?=^## |^Made with |\Z)", re.MULTILINE | re.DOTALL)
_WHAT = re.compile(rf"^A {LORA_ADAPTER.what} `[^`\n]*`", re.MULTILINE)
_MERGED = """\
## How to load it

The adapter is merged into the weights of its base model here. Merging uses no training data, so the guarantee of the
adapter holds for this model too.

"""


def carry_guarantee(adapter: Path, folder: Path) -> PrivacyStatement | None:
    """Copy report, ledger, plot, settings and card of an adapter to the folder of the merged model; add checksums.

    Args:
        adapter: the folder that was published with the adapter.
        folder: the merged model's, with all its other files.

    Returns:
        The guarantee; None if the adapter has no report. Nothing but settings is copied then.

    Raises:
        InvalidArgument: the report is damaged.
    """
    known = (adapter / REPORT_NAME).is_file()
    statement = read_privacy_report(adapter / REPORT_NAME) if known else None
    for name in _COPIED if known else (SETTINGS_NAME,):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    if known and (adapter / CARD_NAME).is_file():
        text = (adapter / CARD_NAME).read_text(encoding="utf-8")
        (folder / CARD_NAME).write_text(card_of_merged(text), encoding="utf-8")
    if known:
        write_checksums(folder, but=COMPLETED_BY_PEOPLE)
    return statement


def card_of_merged(text: str) -> str:
    """An adapter's card for the merged model: what it is and how to load it. What a user wrote elsewhere stays."""
    loading = _MERGED + WHOLE_MODEL.use + "\n"
    text = text.replace('\nlibrary_name: "peft"\n', '\nlibrary_name: "transformers"\n', 1)
    text = _WHAT.sub(lambda found: f"{found[0]}, merged into its weights", text, count=1)
    found, count = _LOADING.subn(lambda _: loading, text, count=1)
    return found if count else f"{text.rstrip()}\n\n{loading}"
