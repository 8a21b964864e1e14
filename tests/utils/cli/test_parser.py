"""Dataclasses as flags: types, spellings, defaults, what is required, and what --help shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import pytest

from utils.cli.parser import DataclassParser, exit_with


@dataclass
class Kinds:
    """One field of each kind."""

    _argument_group_name = "kinds of flags"

    text: str
    number: int = field(default=3, metadata={"help": "how many"})
    share: float = field(default=0.5, metadata={"help": "how much"})
    maybe: int | None = field(default=None, metadata={"help": "nothing unless given"})
    old_style: Optional[str] = None  # noqa: UP045
    choice: str = field(default="a", metadata={"choices": ("a", "b"), "help": "which"})
    open: float | Literal["auto"] = 1.0
    several: list[int] = field(default_factory=lambda: [1, 2])
    names: list[str] | None = None
    switch: bool = False
    on_already: bool = field(default=True, metadata={"help": "is on"})


def parsed(*words: str) -> Kinds:
    parser, line = DataclassParser([Kinds]), ["--text", "t", *words]
    (kinds,), unknown = parser.parse_groups(line), parser.unknown_words(line)
    assert unknown == []
    return kinds


def test_without_flags_the_defaults_apply() -> None:
    assert parsed() == Kinds("t")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--number", "-7"], "number", -7),
        (["--share=1e-3"], "share", 1e-3),
        (["--maybe", "4"], "maybe", 4),
        (["--old-style", "x"], "old_style", "x"),
        (["--old_style", "x"], "old_style", "x"),
        (["--choice", "b"], "choice", "b"),
        (["--open", "auto"], "open", "auto"),
        (["--open", "-1"], "open", -1.0),
        (["--several", "3", "4", "5"], "several", [3, 4, 5]),
        (["--names", "x"], "names", ["x"]),
        (["--switch"], "switch", True),
        (["--switch", "False"], "switch", False),
        (["--on_already", "no"], "on_already", False),
        (["--no_on_already"], "on_already", False),
        (["--no-on-already"], "on_already", False),
        (["--no_on_already", "--on_already"], "on_already", True),
    ],
)
def test_a_flag_gives_a_value_of_its_fields_type(words: list[str], name: str, value: Any) -> None:
    found = getattr(parsed(*words), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --text"),
        (["--text", "t", "--number", "3.5"], "argument --number: invalid int value: '3.5'"),
        (["--text", "t", "--open", "x"], "argument --open: give a number or auto, not 'x'"),
        (["--text", "t", "--choice", "c"], "argument --choice: invalid choice: 'c'"),
        (["--text", "t", "--switch", "perhaps"], "argument --switch: give true or false, not 'perhaps'"),
        (["--text", "t", "--several"], "argument --several: expected at least one argument"),
        (["--text", "t", "--no_on_already=1"], "argument --no_on_already/--no-on-already: ignored explicit argument"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        DataclassParser([Kinds]).parse_groups(words)
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("words", [["--num", "3"], ["--no_switch"], ["--unheard-of=3"]])
def test_abbreviated_and_other_flags_are_unknown(words: list[str]) -> None:
    unknown = DataclassParser([Kinds]).unknown_words(["--text", "t", *words])
    assert unknown == words


def test_help_has_titles_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        DataclassParser([Kinds], "Above.\n    indented").parse_groups(["--help"])
    shown = capsys.readouterr().out
    assert "Above.\n    indented\n" in shown
    assert "\nkinds of flags:\n" in shown
    said = " ".join(shown.split())
    for part in ("how many (default: 3)", "how much (default: 0.5)", "is on (default: True)", "turns off --on_already"):
        assert part in said
    assert "--choice {a,b}" in said
    assert "nothing unless given --old_style" in said  # no default is shown where there is none


@dataclass
class Words:
    """Two words and a flag."""

    source: str = field(metadata={"help": "where from", "positional": True})
    count: int = field(metadata={"positional": True})
    switch: bool = False


def test_positional_fields_are_words(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["here", "3", "--switch"], ["--switch", "true", "here", "3"]):
        assert DataclassParser([Words]).parse_groups(line) == [Words("here", 3, switch=True)]
    with pytest.raises(SystemExit):
        DataclassParser([Words]).parse_groups(["here"])
    assert "the following arguments are required: COUNT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        DataclassParser([Words]).parse_groups(["--help"])
    assert "SOURCE" in capsys.readouterr().out


def test_a_type_that_flags_cannot_have_is_refused() -> None:
    @dataclass
    class Odd:
        table: dict[str, int]

    Odd.__annotations__["table"] = dict[str, int]
    with pytest.raises(TypeError, match="cannot be the type of a flag"):
        DataclassParser([Odd])


def test_exit_with_prints_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        exit_with("nothing to do")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: nothing to do\n"
