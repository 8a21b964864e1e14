"""The date that a chat template tells: that of the run's first day, however long the run takes.

Some templates write today's date into the prompt (Llama 3.2, gpt-oss). Rendered after midnight, the same rows would be
other training data, and a model would be sampled with another prompt than it was trained with. So a run fixes the date
when it begins, records it, and uses it again when it resumes and when its model is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptune._validate import refuse
from utils.files.folders import recorded_by_training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "template_date"  # its name in records
_ASKS = "strftime_now"  # the function by which templates ask for the date


def tells_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes the date."""
    return _ASKS in str(tokenizer.chat_template or "")


def today() -> str:
    """The day on which the transformers library would render a template now, as YYYY-MM-DD."""
    return str(_library().datetime.now().date().isoformat())


def require_day(text: str, flag: str) -> None:
    """Refuse what is no day."""
    try:
        date.fromisoformat(text)
    except ValueError:
        refuse(flag, text, "give a day as YYYY-MM-DD")


@contextmanager
def told_date(day: str | None) -> Iterator[None]:
    """Chat templates tell this day (YYYY-MM-DD) while the block runs; None leaves them alone.

    Values that a caller passes to a template may not be functions, so the library's clock is set instead.
    """
    if day is None:
        yield
        return
    fixed, library = datetime.fromisoformat(day), _library()

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return fixed.replace(tzinfo=tz)

    real, library.datetime = library.datetime, Clock
    try:
        template = "{{ " + _ASKS + "('%Y-%m-%d') }}"
        ((told,), _) = library.render_jinja_template([[{"role": "user", "content": ""}]], chat_template=template)
        if told != day:
            raise RuntimeError(f"chat templates tell {told} instead of {day}: this version of transformers is unknown")
        yield
    finally:
        library.datetime = real


def date_of_training(trained: str | Path) -> str | None:
    """The date that the prompts of a training told; None if it told none or is unknown.

    Args:
        trained: what the training left: an adapter's file or folder, a checkpoint, or the folder of a whole model.
    """
    for found in recorded_by_training(trained, TEMPLATE_DATE):
        try:
            return date.fromisoformat(str(found)).isoformat()
        except ValueError:
            continue
    return None


def _library() -> Any:
    from transformers.utils import chat_template_utils

    return chat_template_utils
