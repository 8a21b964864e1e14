"""Looking at rows from the command line: without weights, with the trainer's flags, and marked as not private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import look
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_and_statistics(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", *({"q": f"Say {n}.", "a": f"It is {n}.", "user": n % 2} for n in range(9)))
    flags = ["--prompt_column", "q", "--answer_column", "a", "--prompt_style", "chat", "--privacy_unit", "user"]
    look.main([path, "--model_name_or_path", model, *flags, "--rows", "2", "9"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == look.WARNING == "This shows rows of your data: not private, do not publish."
    assert [line.split("  ")[0] for line in lines if line.startswith("row ")] == ["row 2", "row 9"]
    shown = [line.replace("·", "") for line in lines]
    assert "<|user|>\\nSay 1.</s>\\n<|assistant|>\\n[It is 1.</s>]" in shown
    assert "author 1" in lines
    assert "rows                   9" in lines
    assert "rows per author        median 4.5, largest 5" in lines
    assert "\033" not in "".join(lines)


def test_three_rows_by_default(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"Hello {n}"} for n in range(9)))
    look.main(["--train_file", path, "--model-name-or-path", model, "--first_rows", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("row ") for line in lines) == 3
    assert "rows                   8 (only the first were read: --first_rows)" in lines
    look.main([path, "--model_name_or_path", model, "--first_rows", "50"])
    assert "rows                   9" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none.jsonl"], "--train_file='none.jsonl': no such file"),
        (["{path}", "--rows", "0"], "--rows=0: "),
        (["{path}", "--rows", "7"], "--rows=7: there are 1 rows"),
        (["{path}", "--first_rows", "0"], "--first_rows=0: "),
        (["{path}", "--block_size", "1"], "--block_size=1: "),
        (["{path}", "--qbits", "16"], "--qbits=16: is not read here"),
        (["{path}", "--train_file", "b.jsonl"], "stand before the flags too"),
        (["{path}", "--dataset_name", "pubmed_generation"], "exactly one of --train_file and --dataset_name"),
        (["{path}", "--text_column", "words"], "--text_column='words': no such column"),
        ([], "exactly one of --train_file and --dataset_name"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], told: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "Hello"})
    given = [word.format(path=path) for word in words]
    with pytest.raises(SystemExit, match="2"):
        look.main([*given, "--model_name_or_path", model])
    found = capsys.readouterr()
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert told in found.err
    assert found.out == ""


def test_a_column_of_users_is_told_with_what_a_private_run_needs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = write(tmp_path / "u.jsonl", {"text": "Hello", "user": "ann"})
    look.main([users, "--model_name_or_path", model])
    out = capsys.readouterr().out
    assert "names people in        user: a private run needs --privacy_unit user to protect people" in out
    assert "ann" not in out
    look.main([users, "--model_name_or_path", model, "--privacy_unit", "user"])
    assert "names people in" not in capsys.readouterr().out
