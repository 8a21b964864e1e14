"""Files of instructions: what each format gives, how formats are recognised, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dptune._validate import InvalidArgument
from utils.data.instruction_files import Instruction, read_instructions

ROOT = Path(__file__).resolve().parents[3]


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


def _file(tmp_path: Path, content: str | list[Any], name: str = "instructions.txt") -> str:
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


ALPACA = [
    {"instruction": "What is\n2 + 2?", "output": "4", "generator": "davinci", "dataset": "helpful_base"},
    {"instruction": "Why \\n?", "output": "", "generator": "davinci", "dataset": "koala"},
]
JSONL = '{"instruction": "One\u2028two", "id": 1}\n\n{"instruction": "Three", "answer": "x"}\n'


@pytest.mark.parametrize(
    ("content", "kind", "texts"),
    [
        ("One\n\n  a\\nb \\\\nabla\r\n", "lines", ["One", "a\nb \\nabla"]),
        ("[INST] is not JSON\n{nor this}\n", "lines", ["[INST] is not JSON", "{nor this}"]),
        (" #### 3\n", "repeated", ["", "", ""]),
        (["One", "a\\nb", "", "x #### 2"], "json", ["One", "a\\nb", "", "x #### 2"]),
        (JSONL, "json", ["One\u2028two", "Three"]),
        ([{"instruction": "One"}, {"instruction": "Two", "id": "b"}], "json", ["One", "Two"]),
        (ALPACA, "alpaca_eval", ["What is\n2 + 2?", "Why \\n?"]),
    ],
)
def test_the_format_is_seen_in_the_content(
    content: str | list[Any], kind: str, texts: list[str], tmp_path: Path
) -> None:
    found = read_instructions(_file(tmp_path, content))
    assert (found.format, found.texts) == (kind, texts)
    assert read_instructions(_file(tmp_path, content), kind) == found


def test_alpaca_evals_data_sets_are_kept(tmp_path: Path) -> None:
    found = read_instructions(_file(tmp_path, ALPACA, "alpaca_eval.json"))
    assert found.instructions[1] == Instruction("Why \\n?", "koala")
    assert read_instructions(_file(tmp_path, ALPACA), "json").instructions[1] == Instruction("Why \\n?")


def test_a_separator_is_text_if_the_format_is_lines(tmp_path: Path) -> None:
    path = _file(tmp_path, "What does #### mean?\nWhy?\n")
    assert read_instructions(path, "lines").texts == ["What does #### mean?", "Why?"]
    with pytest.raises(InvalidArgument, match=r"line 1 has mean. after ####"):
        read_instructions(path)


@pytest.mark.parametrize(
    ("content", "name", "kind", "expected"),
    [
        ('["One", ', "a.json", "auto", "neither a JSON list nor"),
        ("One\nTwo\n", "a.jsonl", "auto", "neither a JSON list nor"),
        ("One\n", "a.txt", "alpaca_eval", "neither a JSON list nor"),
        ('"One"', "a.json", "auto", "neither a JSON list nor"),
        ('["One", 2]', "a.json", "auto", "entry 2 is neither text nor"),
        ('["One", "\\ud800"]', "a.json", "auto", "entry 2 is neither text nor"),
        ('{"instruction": "One"}\n{"prompt": "Two"}', "a.txt", "auto", "entry 2 is neither text nor"),
        ('[{"instruction": "One", "context": "Two"}]', "a.json", "auto", "context of entry 1 would be left out; join"),
        ('[{"instruction": "One", "input": 2}]', "a.json", "auto", "entry 1 has an input that is no text"),
        ('[{"instruction": "One", "dataset": 3}]', "a.json", "auto", "entry 1 has a dataset that is not a string"),
        ("[]", "a.json", "auto", "holds no instruction"),
        ("One\nTwo #### 1\n", "a.txt", "auto", "line 1 has no ####"),
    ],
)
def test_a_file_that_is_not_of_its_format_is_refused(
    content: str, name: str, kind: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=f"^--instruction_file=.*{expected}"):
        read_instructions(_file(tmp_path, content, name), kind)


def test_the_shipped_file_for_unconditional_generation_is_a_thousand_empty_instructions() -> None:
    assert read_instructions(str(ROOT / "scripts/syn_instruct.txt")).texts == [""] * 1000
