r"""Turn a file of conversations into the instructions that a generator is trained on privately.

    python -m scripts.prepare_conversations --input_file lmsys/train-*.parquet --output_file instructions.jsonl \
        --language English --min_chars 5 --max_chars 4000

reads LMSYS-Chat-1M's format (`conversation` of role and content) or ShareGPT's (`conversations` of from and value), as
JSON, JSONL or Parquet, and writes a row {id, instruction} for the first question of each, in their order. Markers of
redaction (NAME_1) stay as they are. White space is normalised and exact copies are left out, before the privacy unit is
counted (utils/data/conversations.py says why that costs nothing). A row of the output is then the unit. With
--user_column the user is: rows carry `user`, copies are left out within a user only, and training takes
--privacy_unit user.

With --keep_answers the first reply goes along as `answer`; copies are then rows whose reply is the same as well (within
a user, the first reply stays). --language is compared with the file's column `language`; rows without one are
identified by py3langid, and --language must be its code (en).
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
    """What is read, what is kept, and where it goes."""

    _argument_group_name = "conversations"

    input_file: list[str] = field(metadata={"help": "one file or more: .json, .jsonl, .parquet or a saved DatasetDict"})
    output_file: str = field(metadata={"help": "JSONL; takes its name once it is whole"})
    language: str | None = field(default=None, metadata={"help": "keep this one: English, or en; default: all"})
    min_chars: int = field(default=1, metadata={"help": "shortest instruction, in characters"})
    max_chars: int | None = field(default=None, metadata={"help": "longest instruction, in characters"})
    user_column: str | None = field(default=None, metadata={"help": "column that names each row's user: the unit"})
    ignore_users: bool = field(
        default=False, metadata={"help": "protect rows although the file names users: one user's rows add up"}
    )
    keep_answers: bool = field(default=False, metadata={"help": "write the first reply too; rows without one go"})

    def __post_init__(self) -> None:
        if Path(self.output_file).suffix != ".jsonl":
            refuse("--output_file", self.output_file, "name it .jsonl")
        if any(Path(self.output_file).resolve() == Path(path).resolve() for path in self.input_file):
            refuse("--output_file", self.output_file, "is an input file; give another")
        if self.user_column is not None and self.ignore_users:
            refuse("--ignore_users", True, "leave it out where --user_column names the users")

    @property
    def selection(self) -> Selection:
        """What is kept."""
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
    print(f"read {number + counts.total()}, kept {number}: {output}")
    for reason, count in counts.most_common():
        print(f"left out: {count}: {reason}")
    nobodys = users.pop(None, 0)
    unit = "a distinct row" if args.user_column is None else "a user, or a row without one"
    print(
        f"privacy unit: {unit}; {len(users) + nobodys} of them. The counts are exact: NOT PRIVATE, don't publish them"
    )


def read(args: ConversationArguments) -> Iterator[tuple[Place, Row]]:
    """All rows of all files, and where they stand.

    Raises:
        InvalidArgument: a file that is not of conversations, or whose users were not thought of; names its columns.
    """
    for path in args.input_file:
        for number, row in enumerate(stream_rows(path, INPUT), start=1):
            if number == 1:
                _check_columns(row, path, args)
            if args.user_column is None and not args.ignore_users:
                refuse_unnoticed_users([row], INPUT, path, "--user_column")
            yield Place(INPUT, path, number), row


def _check_columns(row: Row, path: str, args: ConversationArguments) -> None:
    """What the first row of a file must have."""
    shown = show_columns(row)
    if not any(name in row for name in TURN_COLUMNS):
        refuse(INPUT, path, f"found the columns {shown}; one must be {' or '.join(TURN_COLUMNS)}")
    if args.user_column is not None and args.user_column not in row:
        refuse("--user_column", args.user_column, f"no such column in {path}, which has {shown}; name one of them")


def _refuse_nothing_kept(args: ConversationArguments, counts: Counter[str]) -> None:
    """An empty file would be found out later, by the next stage."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(3)) or "no rows"
    hint = ""
    if counts["another language"]:
        hint = f"; is {args.language!r} what the column language calls it (English), or a code (en)?"
    refuse(INPUT, " ".join(args.input_file), f"nothing is kept ({reasons}); mend the filters{hint}")


if __name__ == "__main__":
    with exit_on_invalid_argument(ConversationArguments):
        main()
