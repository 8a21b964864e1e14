"""Cut a file of rows into those to train on and those to choose settings by, so that neither is scored on.

    python -m benchmarks.cut_rows sst2/train.tsv --choose 3000 --output_dir cut

writes the last 3,000 rows to cut/choose.jsonl and the others to cut/train.jsonl, in their order. Files: those that the
training scripts read, and GLUE's TSV.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dptune._validate import refuse, require_count
from utils.cli.flags import exit_on_invalid_argument
from utils.files.jsonl import write_jsonl
from utils.files.tables import read_rows


@exit_on_invalid_argument()
def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the rows")
    parser.add_argument("--choose", type=int, required=True, help="how many rows to choose settings by")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for train.jsonl and choose.jsonl")
    args = parser.parse_args(argv)
    require_count("--choose", args.choose)
    rows = list(_glue(args.file)) if args.file.suffix == ".tsv" else read_rows(args.file, "file")
    if args.choose >= len(rows):
        refuse("--choose", args.choose, f"leaves no row of {len(rows):,} to train on; give fewer")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[: -args.choose]), ("choose", rows[-args.choose :])):
        count = write_jsonl(args.output_dir / f"{name}.jsonl", part)
        print(f"{args.output_dir / name}.jsonl: {count:,} rows")


def _glue(path: Path) -> Iterator[Mapping[str, object]]:
    """Rows of one of GLUE's TSV files, which quotes nothing; labels are numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {name: int(value) if name == "label" and value.isdigit() else value for name, value in row.items()}


if __name__ == "__main__":
    main()
