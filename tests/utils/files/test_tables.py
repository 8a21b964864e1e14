"""JSON that Python does not take, by line and in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.data.instruction_files import read_instructions
from utils.files.tables import read_rows

DEEP = "[" * 100_000
LONG = "9" * 5000


@pytest.mark.parametrize("value", [DEEP, LONG])
def test_json_that_python_does_not_take_is_refused_by_line(value: str, tmp_path: Path) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"instruction": "a"}\n{"instruction": ' + value + "}\n")
    whole.write_text('[{"instruction": ' + value + "}]")
    with pytest.raises(InvalidArgument, match=r"line 2 is not JSON \(a number of thousands of digits, or nested"):
        read_rows(lines, "--file")
    with pytest.raises(InvalidArgument, match="not JSON at line 1"):
        read_rows(whole, "--file")
    with pytest.raises(InvalidArgument, match="neither a JSON list nor one JSON object a line"):
        read_instructions(str(whole), "json")
