r"""Show what a training run would see of your rows: tokens, which of them are learned, and what is cut.

    python -m scripts.look my.jsonl --model_name_or_path PATH --prompt_style chat --block_size 512

It takes files as `train_clm.py` does, and its flags for data. It needs the model's tokenizer, not its weights. Tokens
stand between `·`. Learned ones are green, or in [brackets] where the output is no terminal or NO_COLOR is set. Without
--rows it shows three rows, drawn at random each time. All rows are read for the statistics, unless you give
--first_rows. The output is not private.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from dptune._aliases import spellings
from dptune._validate import refuse, require_count
from dptune.units.unit import EXAMPLE, PrivacyUnit
from utils.cli.flags import exit_on_invalid_argument, given_fields, parse, refuse_unread
from utils.models.arguments import ModelArguments
from utils.training.data_arguments import DataArguments

WARNING = "This shows rows of your data: not private, do not publish."
_UNREAD = ("qbits", "validation_file", "data_cache", "train_file_weights")


@dataclass
class LookArguments:
    """Which rows to show."""

    _argument_group_name = "rows"

    rows: list[int] | None = field(
        default=None, metadata={"help": "numbers of the rows to show, from 1; by default three drawn at random"}
    )
    first_rows: int | None = field(
        default=None, metadata={"help": "read only so many rows of a large data set; by default all of them"}
    )
    privacy_unit: str = field(
        default=EXAMPLE, metadata={"help": "column of each row's author, as in training; example for none"}
    )

    def __post_init__(self) -> None:
        for number in self.rows or ():
            require_count("--rows", number)
        if self.first_rows is not None:
            require_count("--first_rows", self.first_rows)

    @property
    def author_column(self) -> str | None:
        """The column of authors."""
        return None if self.privacy_unit == EXAMPLE else self.privacy_unit


GROUPS = (ModelArguments, DataArguments, LookArguments)


@exit_on_invalid_argument(*GROUPS)
def main(argv: Sequence[str] | None = None) -> None:
    """Read the rows, and print some of them and the statistics."""
    words = with_files(sys.argv[1:] if argv is None else argv)
    model, data, args = parse(*GROUPS, args=words, description=__doc__)
    refuse_unread(given_fields(words, GROUPS), _UNREAD, "is not read here: leave it out", model, data)
    # Imported here, so that --help and a mistyped flag do not wait for torch and transformers.
    from utils.data.look import look_at_rows, shown_row, statistics
    from utils.data.make_rows import RowSettings
    from utils.data.template_date import tells_date, today
    from utils.models.loading import load_tokenizer

    unit = PrivacyUnit(args.author_column)
    source = data.training_rows(unit)
    tokenizer = load_tokenizer(model.model_name_or_path, **model.hub)
    day = today() if tells_date(tokenizer) else None
    require_count("--block_size", data.block_size, minimum=2)
    settings = RowSettings(data.prompt_style, tokenizer, data.block_size, unit, 0, None, day, data.named)
    look = look_at_rows(settings, source, chosen=args.rows or (), first=args.first_rows)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    rows = [line for row in look.shown for line in (*shown_row(row, tokenizer, data.block_size, colour=colour), "")]
    sampled = args.first_rows is not None and len(look.lengths) == args.first_rows
    print(WARNING, "", *rows, sep="\n")
    print(*statistics(look, data.block_size, sampled=sampled, authors=unit.column is not None), sep="\n")


def with_files(words: Sequence[str]) -> list[str]:
    """The command line in which the files that it begins with are the values of --train_file."""
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    if not first:
        return list(words)
    if any(word.partition("=")[0] in spellings("train_file") for word in words):
        refuse("--train_file", " ".join(words[:first]), "stand before the flags too; name all files in one place")
    return ["--train_file", *words]


if __name__ == "__main__":
    main()
