"""Files of instructions: what each format gives, what is taken for which, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.instruction_files import read_instructions

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_instruction_file_reads() -> None:
    instructions = read_instructions(str(ROOT / "scripts/example_instruction_file.txt")).texts
    assert len(instructions) == 11
    assert len(set(instructions)) == 6
    assert sum("\n\n" in one for one in instructions) == 2
    assert "####" not in "".join(instructions)


def test_instructions_are_read_with_their_escapes(tmp_path: Path) -> None:
    file = tmp_path / "instructions.txt"
    file.write_bytes("\ufeffOne #### 2\r\n\r\n  a\\nb \\\\nabla ####  1 \n#### heading #### 1\n#### 1".encode())
    assert read_instructions(str(file)).texts == ["One", "One", "a\nb \\nabla", "#### heading", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fine #### 1\n\nno number ####", "line 3 has nothing after ####"),
        ("half #### 1.5", "line 1 has 1.5 after ####"),
        ("none #### 0", "line 1 has 0 after ####"),
        ("less #### -1", "line 1 has -1 after ####"),
        ("word #### two", "line 1 has two after ####"),
        ("fine #### 1\nthree ### 1", "line 2 has no ####"),
        ("\n \n", "holds no instruction"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "instructions.txt"
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=f"^--instruction_file=.*{expected}"):
        read_instructions(str(file))


@pytest.mark.parametrize("content", [None, b"caf\xe9 #### 1"])
def test_an_unreadable_instruction_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "instructions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"cannot be read \("):
        read_instructions(str(file))
