r"""Split annotated instructions into a saved `DatasetDict` with train, val and test, for supervised fine-tuning.

    python -m scripts.split_dataset --input_file annotated/annotated.jsonl --output_dir data/labelled_synthetic \
        --val_share 0.05 --test_share 0.05 --seed 0

Each split has the columns `instruction` and `answer`, `id` if every row has one, and `user` with --user_column. The
folder's name must begin with `labelled`, by which the training command recognises pairs. A hash of the seed and the
instruction decides the split of a row, so copies of an instruction are in one split. With --user_column a hash of the
user decides, so all rows of a user are in one split. The folder is written whole or not at all; running the same line
again does nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptune._files import write_folder
from dptune._validate import refuse
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.data.lost_columns import refuse_lost_columns
from utils.data.row_authors import refuse_unnoticed_users
from utils.data.splits import LABELLED, Shares, split_rows
from utils.files.cells import Place, author_of, require_columns, text_of
from utils.files.tables import Row, read_rows, show_columns

RECORD_NAME, INPUT = "split.json", "--input_file"


@dataclass
class SplitArguments:
    """Files and shares."""

    _argument_group_name = "split"

    input_file: str = field(metadata={"help": "JSONL (or .json, .csv, .parquet) with `instruction` and `answer`"})
    output_dir: str = field(metadata={"help": f"folder to write; its name must begin with {LABELLED}"})
    val_share: float = field(default=0.05, metadata={"help": "average share of instructions for validation"})
    test_share: float = field(default=0.05, metadata={"help": "average share of instructions for testing"})
    seed: int = field(default=0, metadata={"help": "seed of the split"})
    user_column: str | None = field(
        default=None, metadata={"help": "column of users, whose rows stay together; default: none"}
    )
    ignore_users: bool = field(
        default=False, metadata={"help": "drop the column of users; later only rows can be protected, not users"}
    )

    @property
    def shares(self) -> Shares:
        """The shares of the splits."""
        return Shares(self.val_share, self.test_share)

    def __post_init__(self) -> None:
        name = Path(self.output_dir).resolve().name
        if not name.startswith(LABELLED):
            refuse("--output_dir", self.output_dir, f"its name must begin with {LABELLED}; give {LABELLED}_{name}")
        _ = self.shares
        if self.user_column is not None and self.ignore_users:
            refuse("--ignore_users", True, "contradicts --user_column; leave one out")


def main(argv: Sequence[str] | None = None) -> None:
    """Split, unless it is done already.

    Args:
        argv: the command line; `sys.argv[1:]` if None.

    Raises:
        InvalidArgument: naming the flag, its value and the remedy.
    """
    (args,) = parse(SplitArguments, args=argv, description=__doc__)
    folder = Path(args.output_dir)
    rows = read_pairs(args.input_file, args.user_column, ignore_users=args.ignore_users)
    record = {"rows_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    record |= {"seed": args.seed, "val_share": args.val_share, "test_share": args.test_share}
    if _is_done(folder, record):
        print(f"{folder}: already there")
        return
    splits = split_rows(rows, args.shares, args.seed)
    for name, side in splits.items():
        if not side:
            flag = f"--{'val' if name == 'train' else name}_share"
            value = args.val_share if name != "test" else args.test_share
            refuse(flag, value, f"no row of {len(rows)} is in {name}; give other shares, another --seed or more rows")
    write(folder, splits, record)
    print(f"{folder}: {', '.join(f'{len(side)} {name}' for name, side in splits.items())}")


def read_pairs(path: str, user_column: str | None, *, ignore_users: bool = False) -> list[Row]:
    """Rows of texts: `instruction`, `answer`, `id` if all rows have one, and `user` with a column of users.

    Raises:
        InvalidArgument: what `read_rows` refuses, a missing column, a value that is not text, or a column of users that
            no flag mentions. The message names the row and does not show it.
    """
    rows = read_rows(path, INPUT)
    if user_column is None and not ignore_users:
        refuse_unnoticed_users(rows, INPUT, path, "--user_column")
    for name in ("instruction", "answer"):
        if not any(name in row for row in rows):
            refuse(INPUT, path, f"found the columns {show_columns(rows[0])}; {name} is missing (scripts/annotate.py)")
    if user_column is not None and not any(user_column in row for row in rows):
        refuse("--user_column", user_column, f"no such column in {path}, which has {show_columns(rows[0])}")
    with_id = all(isinstance(row.get("id"), str | int) for row in rows)
    return [_pair(row, user_column, with_id, Place(INPUT, path, number)) for number, row in enumerate(rows, start=1)]


def write(folder: Path, splits: Mapping[str, Sequence[Row]], record: Mapping[str, object]) -> None:
    """Save the splits with a record of what they were made from."""

    import datasets  # slow to import

    def fill(partial: Path) -> None:
        saved = {name: datasets.Dataset.from_list(list(rows)) for name, rows in splits.items()}
        datasets.DatasetDict(saved).save_to_disk(str(partial))
        (partial / RECORD_NAME).write_text(json.dumps(dict(record), indent=2) + "\n")

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, fill)


def _pair(row: Row, user_column: str | None, with_id: bool, place: Place) -> Row:
    require_columns(row, ("instruction", "answer"), place)
    refuse_lost_columns(row, ("instruction", "answer"), place)
    pair: Row = {name: text_of(row, name, place) for name in ("instruction", "answer")}
    if with_id:
        pair["id"] = str(row["id"])
    if user_column is not None:
        pair["user"] = author_of(row, user_column, place)
    return pair


def _is_done(folder: Path, record: Mapping[str, object]) -> bool:
    """Whether the folder holds exactly this split; refuses a folder with anything else."""
    if not folder.exists():
        return False
    path = folder / RECORD_NAME
    if not path.is_file():
        refuse("--output_dir", str(folder), "exists and is not from this script; give another folder")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        refuse("--output_dir", str(folder), f"its {RECORD_NAME} is damaged; remove the folder, or give another")
    if saved != dict(record):
        refuse(
            "--output_dir", str(folder), "holds a split with other rows or settings; remove it, or give another folder"
        )
    return True


if __name__ == "__main__":
    with exit_on_invalid_argument(SplitArguments):
        main()
