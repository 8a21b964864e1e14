r"""Let an OpenAI-compatible endpoint answer instructions, to train an assistant on the pairs.

    export OPENAI_API_KEY=...      # not needed for a server without keys
    python -m scripts.annotate --input_file synthetic.jsonl --output_dir annotated \
        --base_url http://127.0.0.1:8000/v1 --model NAME --max_concurrency 8 --max_tokens 1024

The instructions are sent to --base_url, so send only synthetic ones. Their epsilon is already spent, and answers to
them cost no more. The key is read only from the environment variable OPENAI_API_KEY.

Writes to --output_dir: `annotated.jsonl` (the rows in order, each with a new `answer`; a row without `id` gets
row-<number>), `set_aside.jsonl` (rows without a usable answer, with the reason) and `summary.json` (counts, tokens,
cost). Each reply is saved to `answers.jsonl` at once. So run the same line again to resume after an interruption;
nothing is asked twice. --retry_set_aside retries the rows that were set aside.
"""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from dptune._validate import refuse
from dptune._words import counted
from dptune.run.lock import FolderLock
from utils.annotation.arguments import AnnotationArguments, EndpointArguments
from utils.annotation.files import (
    ANNOTATED_NAME,
    Question,
    ReplyJournal,
    annotation_identity,
    make_questions,
    write_annotations,
)  # fmt: skip
from utils.cli.endpoints import OPENAI_KEY, key_from_environment
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.cli.interruption import StopRequest
from utils.data.lost_columns import refuse_lost_columns
from utils.files.cells import Place, require_columns, text_of
from utils.files.jsonl import json_line
from utils.files.tables import Row, read_rows, show_columns

if TYPE_CHECKING:
    from utils.annotation.asking import Answered
    from utils.annotation.replies import Reply

GROUPS = (AnnotationArguments, EndpointArguments)
INPUT = "--input_file"


def main(argv: Sequence[str] | None = None) -> None:
    """Ask for the missing answers; write the outputs once every row is answered or set aside.

    Args:
        argv: the command line; `sys.argv[1:]` if None.

    Raises:
        InvalidArgument: naming the flag, its value and the remedy.
        SystemExit: a signal stopped the run; the status is 128 + the signal's number.
    """
    files, asked = parse(*GROUPS, args=argv, description=__doc__)
    key = key_from_environment(OPENAI_KEY)
    questions = make_questions(read_instructions(files.input_file), asked.settings)
    folder, journal = Path(files.output_dir), ReplyJournal(Path(files.output_dir))
    with FolderLock() as lock:
        lock.make(folder)
        journal.claim(annotation_identity(questions, asked.settings))
        stopped = ask(questions, journal, asked, key, retry=files.retry_set_aside)
        if stopped is not None:
            settled = journal.settled()
            count = sum(question.key in settled for question in questions)
            _say_how_to_resume(stopped, f"replies for {count} of {len(questions)} rows are saved", argv)
        summary = write_annotations(folder, questions, journal, asked.settings, asked.prices)
    _report(summary, folder)


def read_instructions(path: str) -> list[Row]:
    """The rows of a file, each with an `instruction` and an `id` that are texts.

    Raises:
        InvalidArgument: what `read_rows` refuses, no column `instruction`, an instruction that is blank or not text, or
            a value that JSON cannot hold. The message names the row and does not show it.
    """
    rows = read_rows(path, INPUT)
    if not any("instruction" in row for row in rows):
        refuse(INPUT, path, f"found the columns {show_columns(rows[0])}; one must be named instruction")
    return [_checked(row, Place(INPUT, path, number)) for number, row in enumerate(rows, start=1)]


def ask(
    questions: Sequence[Question], journal: ReplyJournal, asked: EndpointArguments, key: str | None, *, retry: bool
) -> str | None:
    """Ask for the missing answers and save each reply. Returns the name of the signal that stopped it, or None."""
    settled = journal.settled(answered_only=retry)
    pending = list({question.key: question for question in questions if question.key not in settled}.values())
    if not pending:
        return None
    print(f"sending {len(pending)} instructions to {asked.host} for {asked.model}; {len(settled)} have a reply already",
          flush=True)  # fmt: skip
    has_answer = journal.settled(answered_only=True)
    good = next((question for question in questions if question.key in has_answer), None)
    with StopRequest(finishing="the requests under way") as stop, tqdm(total=len(pending), unit="row") as bar:

        def answered(question: Question, reply: Reply) -> None:
            journal.add(question, reply)
            bar.update()

        asyncio.run(_ask_all(pending, answered, asked, key, stop, good))
        cut_short = bar.n < len(pending)
    return stop.name if cut_short else None


async def _ask_all(
    pending: Sequence[Question],
    answered: Answered,
    asked: EndpointArguments,
    key: str | None,
    stop: StopRequest,
    good: Question | None,
) -> None:
    from utils.annotation.asking import Asking, Endpoint  # the openai library is slow to import

    endpoint = Endpoint(
        asked.base_url,
        key,
        asked.request,
        system_prompt=asked.system_prompt,
        timeout=asked.timeout,
        max_retries=asked.max_retries,
    )
    run = Asking(
        endpoint, pending, answered, max_concurrency=asked.max_concurrency, stopping=lambda: stop.pending, good=good
    )
    try:
        await run.run()
    finally:
        await endpoint.close()


def _checked(row: Row, place: Place) -> Row:
    """The row with an id."""
    require_columns(row, ("instruction",), place)
    refuse_lost_columns(row, ("instruction",), place)
    if not text_of(row, "instruction", place).strip():
        place.refuse("its instruction is blank; remove the row")
    given = row.get("id")
    known = isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip()
    named = {**row, "id": str(given) if known else f"row-{place.row}"}
    try:
        json_line(named)
    except (TypeError, ValueError):  # for example a Parquet date, an infinite number, half a surrogate pair
        place.refuse("has a value that JSON cannot hold; give texts, finite numbers, lists and dictionaries")
    return named


def _say_how_to_resume(signal_name: str, state: str, argv: Sequence[str] | None) -> NoReturn:
    """Print the line that resumes, and exit with the status of a process ended by the signal."""
    line = shlex.join(["python", "-m", "scripts.annotate", *(sys.argv[1:] if argv is None else argv)])
    print(f"{signal_name}: {state}; to resume, run:\n{line}", file=sys.stderr)
    raise SystemExit(128 + signal.Signals[signal_name])


def _report(summary: dict[str, Any], folder: Path) -> None:
    """Print a summary."""
    tokens = f"{summary['prompt_tokens']} + {summary['completion_tokens']} tokens"
    cost = "" if summary["cost"] is None else f", cost {summary['cost']:.4f}"
    by = ", ".join(summary["answered_by"]) or "an unnamed model"
    print(
        f"{summary['answered']} of {summary['rows']} rows answered by {by}, {tokens}{cost}: {folder / ANNOTATED_NAME}"
    )
    for reason, count in summary["reasons"].items():
        print(f"set aside: {counted(count, 'row')}: {reason}")
    if not summary["answered"]:
        refuse("--output_dir", str(folder), "no row got a usable answer; see set_aside.jsonl for the reasons")


if __name__ == "__main__":
    with exit_on_invalid_argument(*GROUPS):
        main()
