r"""Turn files of conversations into instructions, to train a generator on privately.

    python -m scripts.prepare_conversations --input_file lmsys/train-*.parquet --output_file instructions.jsonl \
        --language English --min_chars 5 --max_chars 4000

reads LMSYS-Chat-1M's format (`conversation` of role and content) or ShareGPT's (`conversations` of from and value), as
JSON, JSONL or Parquet. It writes a row {id, instruction} for the first question of each conversation, in order. Markers
of redaction (NAME_1) are kept. White space is normalised and exact copies are removed before privacy units are counted
(utils/data/conversations.py says why that costs nothing). The privacy unit is then a row of the output. With
--user_column it is the user: rows have a `user`, copies are removed only within a user, and training needs
--privacy_unit user.

With --keep_answers a row also has the first reply as `answer`. Copies are then rows with the same reply too; within a
user, the first reply is kept. --language is compared with the file's column `language`. Rows without that column are
identified by py3langid, for which --language must be a code (en).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dptune._validate import refuse
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.data.conversations import TURN_COLUMNS, Selection, instructions
from utils.data.languages import LanguageFilter
from utils.data.row_authors import refuse_unnoticed_users
from utils.files.cells import Place
from utils.files.jsonl import write_jsonl
from utils.files.tables import Row, show_columns, stream_rows

INPUT = "--input_file"


@dataclass
class ConversationArguments:
    """Input, filters and output."""

    _argument_group_name = "conversations"

    input_file: list[str] = field(metadata={"help": "one or more .json, .jsonl, .parquet files or saved DatasetDicts"})
    output_file: str = field(metadata={"help": "JSONL file to write; it appears once it is complete"})
    language: str | None = field(default=None, metadata={"help": "language to keep: English, or en; default: all"})
    min_chars: int = field(default=1, metadata={"help": "minimum number of characters per instruction"})
    max_chars: int | None = field(default=None, metadata={"help": "maximum number of characters; default: none"})
    user_column: str | None = field(default=None, metadata={"help": "column of users, which become the privacy unit"})
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect rows although the file names users: a user with many rows is protected less"},
    )
    keep_answers: bool = field(default=False, metadata={"help": "write the first reply too; drop rows without one"})

    def __post_init__(self) -> None:
        if Path(self.output_file).suffix != ".jsonl":
            refuse("--output_file", self.output_file, "give a name that ends in .jsonl")
        if any(Path(self.output_file).resolve() == Path(path).resolve() for path in self.input_file):
            refuse("--output_file", self.output_file, "is an input file; give another file")
        if self.user_column is not None and self.ignore_users:
            refuse("--ignore_users", True, "contradicts --user_column; leave one out")

    @property
    def selection(self) -> Selection:
        """The filters."""
        language = None if self.language is None else LanguageFilter(self.language)
        return Selection(self.min_chars, self.max_chars, language, self.user_column, self.keep_answers)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the instructions and print the counts.

    Args:
        argv: the command line; `sys.argv[1:]` if None.

    Raises:
        InvalidArgument: naming the flag, its value and the remedy.
    """
    (args,) = parse(ConversationArguments, args=argv, description=__doc__)
    selection, output = args.selection, Path(args.output_file)
    counts: Counter[str] = Counter()
    users: Counter[object] = Counter()

    def kept() -> Iterator[Row]:
        for row in instructions(tqdm(read(args), unit="row", file=sys.stderr), selection, counts):
            users[row.get("user")] += 1
            yield row
        if not users:
            _refuse_nothing_kept(args, counts)

    output.parent.mkdir(parents=True, exist_ok=True)
    number = write_jsonl(output, kept())
    print(f"read {number + counts.total()} conversations, kept {number}: {output}")
    for reason, count in counts.most_common():
        print(f"left out {count}: {reason}")
    nobodys = users.pop(None, 0)
    unit = "a distinct row" if args.user_column is None else "a user, or a row without a user"
    print(f"privacy unit: {unit} ({len(users) + nobodys} units). These counts are exact: NOT PRIVATE, do not publish")


def read(args: ConversationArguments) -> Iterator[tuple[Place, Row]]:
    """All rows of all files, with their places.

    Raises:
        InvalidArgument: a file without conversations, or with a column of users that no flag mentions.
    """
    for path in args.input_file:
        for number, row in enumerate(stream_rows(path, INPUT), start=1):
            if number == 1:
                _check_columns(row, path, args)
            if args.user_column is None and not args.ignore_users:
                refuse_unnoticed_users([row], INPUT, path, "--user_column")
            yield Place(INPUT, path, number), row


def _check_columns(row: Row, path: str, args: ConversationArguments) -> None:
    """Refuse a file whose first row lacks a needed column."""
    shown = show_columns(row)
    if not any(name in row for name in TURN_COLUMNS):
        refuse(INPUT, path, f"found the columns {shown}; one must be {' or '.join(TURN_COLUMNS)}")
    if args.user_column is not None and args.user_column not in row:
        refuse("--user_column", args.user_column, f"no such column in {path}, which has {shown}; give one of them")


def _refuse_nothing_kept(args: ConversationArguments, counts: Counter[str]) -> None:
    """Refuse to write an empty file, which only the next stage would notice."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(3)) or "no rows"
    hint = ""
    if counts["another language"]:
        hint = f"; is {args.language!r} what the column language calls it (English), or a code (en)?"
    refuse(INPUT, " ".join(args.input_file), f"nothing is kept ({reasons}); change the filters{hint}")


if __name__ == "__main__":
    with exit_on_invalid_argument(ConversationArguments):
        main()
