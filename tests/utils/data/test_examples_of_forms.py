"""The tables of data/README.md: every example in them is read as it says, and every form has one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.utils.data.test_tool_calls import QWEN25, tokenizer_with
from utils.data.forms import FORMS
from utils.data.load import load_training_data

README = (Path(__file__).resolve().parents[3] / "data" / "README.md").read_text(encoding="utf-8")
TOKENIZER = tokenizer_with(QWEN25)
LEARNED = {  # columns -> what is learned of the example
    "instruction, answer": "Blue.</s>",
    "instruction, output": "Hello</s>",
    "prompt, completion, both lists of turns": "Blue.<|im_end|>\n</s>",
    "prompt, completion": " Blue.</s>",
    "messages": "Blue.<|im_end|>\n</s>",
    "messages with calls of tools": '<tool_call>\n{"name": "pick", "arguments": {"of": "colours"}}\n</tool_call>'
    "<|im_end|>\nBlue.<|im_end|>\n</s>",
    "conversations": "Blue.<|im_end|>\n</s>",
    "text": "We show that aspirin helps.</s>",
}


def table(head: str) -> list[list[str]]:
    """The cells of each row of the table that begins so."""
    (found,) = re.findall(rf"^\| {re.escape(head)} .*\n\| ---.*\n((?:\|.*\n)+)", README, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found.splitlines()]


FORM_ROWS = {re.sub(r"`| \(.*\)", "", columns): re.findall("`(.*?)`", line) for columns, line, _ in table("columns")}


def learned(path: Path) -> str:
    """The learned tokens of a file's only row."""
    how = {"dataset_name": None, "validation_file": None, "prompt_style": "plain", "block_size": 500}
    train, _ = load_training_data(train_file=path, tokenizer=TOKENIZER, **how)  # type: ignore[arg-type]
    assert len(train) == 1
    return str(TOKENIZER.decode(train.ids[train.is_answer]))


def test_every_form_has_an_example() -> None:
    assert FORM_ROWS.keys() == LEARNED.keys()
    columns = ["/".join(form.columns) for form in FORMS]
    documented = [
        name.split(" with ")[0].removesuffix(", both lists of turns").replace(", ", "/") for name in FORM_ROWS
    ]
    assert list(dict.fromkeys(documented)) == list(dict.fromkeys(columns))


@pytest.mark.parametrize("columns", LEARNED)
def test_an_example_line_is_learned_as_it_says(columns: str, tmp_path: Path) -> None:
    (line,) = FORM_ROWS[columns]
    (form, *_) = [one for one in FORMS if one.fits(json.loads(line))]
    assert set(json.loads(line)) <= set(form.used)
    (tmp_path / "d.jsonl").write_text(f"{line}\n")
    assert learned(tmp_path / "d.jsonl") == LEARNED[columns]


def test_every_example_of_a_file_format_is_the_same_row(tmp_path: Path) -> None:
    suffixes, number = [], 0
    for names, _, cell in table("file"):
        contents = ["\n".join(re.findall("`(.*?)`", one)) for one in cell.split(" or ") if one]
        for content in contents:
            (suffix, *_) = re.findall("`(.*?)`", names)
            path = tmp_path / f"{(number := number + 1)}{suffix}"
            path.write_text(f"{content}\n")
            assert learned(path) == "Blue.</s>"
            suffixes.append(suffix)
    assert suffixes == [".json", ".json", ".jsonl", ".csv"]
