r"""Have an OpenAI-compatible endpoint answer instructions, so that an assistant can be trained on the pairs.

    export OPENAI_API_KEY=...      # nothing for a server of your own that wants no key
    python -m scripts.annotate --input_file synthetic.jsonl --output_dir annotated \
        --base_url http://127.0.0.1:8000/v1 --model NAME --max_concurrency 8 --max_tokens 1024

The instructions leave this machine for --base_url: send synthetic ones, whose privacy is paid for already; answers to
them cost no further epsilon. The key is read from the environment variable OPENAI_API_KEY and nowhere else.

Writes to --output_dir: `annotated.jsonl` (the rows in their order with an `answer`, in the place of one that was there;
a row without `id` gets row-<number>), `set_aside.jsonl` (rows whose reply was no usable answer, with the reason) and
`summary.json` (counts, tokens, cost). Each reply is in `answers.jsonl` as soon as it is there, so the same line goes on
after an interruption and asks nothing twice; --retry_set_aside asks again for what was set aside.
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
from utils.files.cells import Place, require_columns, text_of
from utils.files.jsonl import json_line
from utils.files.tables import Row, read_rows, show_columns

if TYPE_CHECKING:
    from utils.annotation.asking import Answered
    from utils.annotation.replies import Reply

GROUPS = (AnnotationArguments, EndpointArguments)
INPUT = "--input_file"


def main(argv: Sequence[str] | None = None) -> None:
    """Ask for what has no answer yet; write the outputs once every row is settled.

    Args:
        argv: the command line; `sys.argv[1:]` if None.

    Raises:
        InvalidArgument: naming the flag, its value and the remedy.
        SystemExit: the run was stopped; 128 and the signal's number.
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
            _say_how_to_go_on(stopped, f"{count} of {len(questions)} rows are settled and kept", argv)
        summary = write_annotations(folder, questions, journal, asked.settings, asked.prices)
    _report(summary, folder)


def read_instructions(path: str) -> list[Row]:
    """The rows of a file, each with a text as `instruction` and as `id`.

    Raises:
        InvalidArgument: what `read_rows` refuses, no column `instruction`, an instruction that is blank or not text, a
            value that JSON cannot hold; names the row and shows nothing of it.
    """
    rows = read_rows(path, INPUT)
    if not any("instruction" in row for row in rows):
        refuse(INPUT, path, f"found the columns {show_columns(rows[0])}; one must be named instruction")
    return [_checked(row, Place(INPUT, path, number)) for number, row in enumerate(rows, start=1)]


def ask(
    questions: Sequence[Question], journal: ReplyJournal, asked: EndpointArguments, key: str | None, *, retry: bool
) -> str | None:
    """Ask for what is not settled, noting each reply; returns the name of the signal that cut it short, if one did."""
    settled = journal.settled(answered_only=retry)
    pending = list({question.key: question for question in questions if question.key not in settled}.values())
    if not pending:
        return None
    print(f"sending {len(pending)} instructions to {asked.host} for {asked.model}; {len(settled)} are settled already",
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
    if not text_of(row, "instruction", place).strip():
        place.refuse("its instruction is blank; leave the row out")
    given = row.get("id")
    known = isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip()
    named = {**row, "id": str(given) if known else f"row-{place.row}"}
    try:
        json_line(named)
    except (TypeError, ValueError):  # such as a date of a Parquet file, an infinite number, half a surrogate pair
        place.refuse("holds a value that JSON cannot; give texts, finite numbers, lists and dictionaries")
    return named


def _say_how_to_go_on(signal_name: str, state: str, argv: Sequence[str] | None) -> NoReturn:
    """Name the line that goes on, and exit as a process does that the signal ended."""
    line = shlex.join(["python", "-m", "scripts.annotate", *(sys.argv[1:] if argv is None else argv)])
    print(f"{signal_name}: {state}; this line goes on:\n{line}", file=sys.stderr)
    raise SystemExit(128 + signal.Signals[signal_name])


def _report(summary: dict[str, Any], folder: Path) -> None:
    """A few lines on what came of it."""
    tokens = f"{summary['prompt_tokens']} + {summary['completion_tokens']} tokens"
    cost = "" if summary["cost"] is None else f", cost {summary['cost']:.4f}"
    by = ", ".join(summary["answered_by"]) or "a model without a name"
    print(
        f"{summary['answered']} of {summary['rows']} rows answered by {by}, {tokens}{cost}: {folder / ANNOTATED_NAME}"
    )
    for reason, count in summary["reasons"].items():
        print(f"set aside: {count} rows: {reason}")
    if not summary["answered"]:
        refuse("--output_dir", str(folder), "no row got a usable answer; see set_aside.jsonl for the reasons")


if __name__ == "__main__":
    with exit_on_invalid_argument(*GROUPS):
        main()
