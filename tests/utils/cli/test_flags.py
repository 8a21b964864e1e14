"""Command lines: groups, unknown flags, secrets, and mistakes as one line with exit status 2."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dptune._aliases import aliases
from dptune._validate import HIDDEN, InvalidArgument, refuse
from utils.cli import parser
from utils.cli.flags import exit_on_invalid_argument, given_fields, naming, parse, public_config, refuse_unread
from utils.generation.arguments import AdapterArguments, SamplingArguments
from utils.models.arguments import ModelArguments

TOKEN = "hf_abcdefghijklmnop"
GROUPS = (ModelArguments, AdapterArguments, SamplingArguments)
NEEDED = ["--model_name_or_path", "m", "--output_dir", "out"]


@dataclass
class SwitchArguments:
    """Two switches, one on by default."""

    _argument_group_name = "switches"

    with_tracking: bool = field(default=False, metadata={"help": "off unless given"})
    shuffle: bool = field(default=True, metadata={"help": "on unless turned off"})


@pytest.fixture(autouse=True)
def _one_process_without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("RANK", raising=False)


def test_help_titles_the_groups_and_never_shows_the_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SystemExit) as exit_:
        parse(*GROUPS, args=["--help"], description="first line\n  second line")
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "first line\n  second line" in shown
    assert all(f"\n{one._argument_group_name}:\n" in shown for one in GROUPS)
    assert "turns off --merge_lora" in shown
    assert TOKEN not in shown


@pytest.mark.parametrize("group", GROUPS)
def test_every_flag_has_help(group: type) -> None:
    assert all(f.metadata.get("help") for f in dataclasses.fields(group))


def test_instances_come_in_order_and_booleans_are_switches() -> None:
    model, switches = parse(ModelArguments, SwitchArguments, args=["--with_tracking", "--model_name_or_path", "m"])
    assert model.model_name_or_path == "m"
    assert (switches.with_tracking, switches.shuffle) == (True, True)
    (switches,) = parse(SwitchArguments, args=["--no_shuffle"])
    assert (switches.with_tracking, switches.shuffle) == (False, False)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--top_pp", "0.5"], "error: unknown flag: --top_pp (did you mean --top_p?)"),
        ([f"--acces_token={TOKEN}"], "error: unknown flag: --acces_token (did you mean --access_token?)"),
        (["--acces_token", TOKEN], "error: unknown flag: --acces_token (did you mean --access_token?)"),
        (["--temp", "0.5"], "error: unknown flag: --temp"),  # an abbreviation
        (["loose", "words"], "error: 2 value(s) that belong to no flag"),
        (["--max_length", "many"], "error: argument --max_length/"),
        (["--prompt_style", "odd"], "error: argument --prompt_style"),
    ],
)
def test_bad_flags_exit_2_with_one_line_that_shows_no_token(
    extra: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*GROUPS, args=[*NEEDED, *extra])
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith(expected)
    assert printed.err.count("\n") == 1
    assert TOKEN not in printed.err


def test_missing_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*GROUPS, args=["--model_name_or_path", "m"])
    assert exit_.value.code == 2
    assert "--output_dir" in capsys.readouterr().err


def test_a_file_beside_the_script_adds_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.args").write_text("--with_tracking")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    (switches,) = parse(SwitchArguments)
    assert not switches.with_tracking


@pytest.mark.parametrize("spelling", ["--access_token", "--access-token"])
@pytest.mark.parametrize("joined", [True, False])
def test_the_token_leaves_the_command_line_once_parsed(
    spelling: str, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"{spelling}={TOKEN}"] if joined else [spelling, TOKEN]
    monkeypatch.setattr(sys, "argv", ["script.py", "--model_name_or_path", "m", *given])
    (model,) = parse(ModelArguments)
    assert model.access_token == TOKEN
    assert TOKEN not in " ".join(sys.argv)
    assert sys.argv[:3] == ["script.py", "--model_name_or_path", "m"]


def test_the_token_comes_from_the_environment_and_is_in_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model, adapter, sampling = parse(*GROUPS, args=NEEDED)
    assert model.access_token == TOKEN
    config = public_config(model, adapter, sampling)
    assert config["model_name_or_path"] == "m"
    assert config["top_k"] == sampling.top_k
    assert "access_token" not in config
    assert TOKEN not in repr(config) + repr(model)


def test_the_flag_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    assert ModelArguments("m", access_token=TOKEN).access_token == TOKEN


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 1),
        ("batch_size", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("repetition_penalty", 0.0),
    ],
)
def test_sampling_refuses_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"^--{name}="):
        SamplingArguments(output_dir="out", **{name: value})


def test_greedy_sampling_is_temperature_0() -> None:
    assert SamplingArguments(output_dir="out", temperature=0).temperature == 0


def _fail() -> None:
    refuse("--top_p", 3, "give less")


def test_an_invalid_argument_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, exit_on_invalid_argument():
        _fail()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: --top_p=3: give less\n"


def test_it_decorates_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        exit_on_invalid_argument()(_fail)()
    assert capsys.readouterr().err == "error: --top_p=3: give less\n"


@dataclass
class LoraArguments:
    """Flags that the engine knows by other names."""

    lora_r: int = 4
    learning_rate: float = 0.1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("learning_rate", "--learning_rate"),  # a field of the flags
        ("rank", "--lora_r"),  # renamed by the program
        ("--rank", "--lora_r"),  # shared code that knows it as another program's flag
        ("--learning_rate", "--learning_rate"),
        ("ledger", "ledger"),  # no flag at all
    ],
)
def test_a_parameter_of_the_engine_is_shown_as_the_programs_flag(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), exit_on_invalid_argument(LoraArguments, flags={"rank": "--lora_r"}):
        refuse(name, 0, "give more than rank 0")
    assert capsys.readouterr().err == f"error: {shown}=0: give more than rank 0\n"


def test_an_inner_naming_comes_before_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(SystemExit),
        exit_on_invalid_argument(LoraArguments),
        naming({"learning_rate": "--adaptive_learning_rate"}),
    ):
        refuse("learning_rate", HIDDEN, "give more")
    assert capsys.readouterr().err == "error: --adaptive_learning_rate: give more\n"


def test_naming_leaves_other_names_and_other_errors_alone() -> None:
    with pytest.raises(InvalidArgument) as caught, naming({"rank": "--lora_r"}):
        refuse("alpha", 2, "give 1")
    assert (caught.value.name, caught.value.value, caught.value.remedy) == ("alpha", 2, "give 1")
    with pytest.raises(ValueError, match="rank"), naming({"rank": "--lora_r"}):
        raise ValueError("rank")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="a mistake of the program"), exit_on_invalid_argument():
        raise ValueError("a mistake of the program")


@dataclass
class _Read:
    some_rate: float = 0.5
    is_on: bool = True
    other: int = 1


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("", set()),
        ("--some_rate 0.5", {"some_rate"}),
        ("--some-rate=0.5", {"some_rate"}),
        ("--no_is_on --other 2", {"is_on", "other"}),
        ("--no-is-on", {"is_on"}),
        ("--another some_rate", set()),
    ],
)
def test_a_flag_is_given_in_any_spelling_and_with_its_default_too(line: str, given: set[str]) -> None:
    assert given_fields(line.split(), [_Read]) == given


@dataclass
class OlderNames:
    """A flag and a secret with older names."""

    clip_norm: float = field(default=1.0, metadata={"help": "how long", "aliases": aliases("max_norm", "clip")})
    access_token: str | None = field(default=None, repr=False, metadata={"help": "t", "aliases": aliases("hf_token")})


@pytest.mark.parametrize("word", ["--clip_norm", "--clip-norm", "--max_norm", "--max-norm", "--clip"])
def test_a_flag_has_older_names(word: str) -> None:
    (found,) = parse(OlderNames, args=[word, "2"])
    assert found == OlderNames(2.0)
    assert given_fields([f"{word}=2"], [OlderNames]) == {"clip_norm"}


def test_an_older_name_is_shown_by_help_and_named_where_a_flag_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in ((["--help"], "--max_norm"), (["--max_nrm", "2"], "did you mean --max_norm?")):
        with pytest.raises(SystemExit):
            parse(OlderNames, args=line)
        assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize(("first", "second"), [("--clip_norm", "--max-norm"), ("--max_norm", "--clip")])
def test_two_names_of_one_flag_are_refused(first: str, second: str) -> None:
    names = [word.replace("-", "_").replace("__", "--", 1) for word in (first, second)]
    with pytest.raises(InvalidArgument, match=f"^--clip_norm: is given as {names[0]} and as {names[1]}; leave one out"):
        parse(OlderNames, args=[first, "2", f"{second}=2"])


def test_the_value_of_a_secrets_older_name_leaves_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--hf_token", TOKEN])
    assert parse(OlderNames)[0].access_token == TOKEN
    assert sys.argv == ["x", "--hf_token", "***"]


def test_an_error_shows_the_standard_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_invalid_argument(OlderNames):
        refuse("max_norm", 3, "too long")
    assert capsys.readouterr().err == "error: --clip_norm=3: too long\n"


def test_the_command_line_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--other", "1"])
    assert given_fields(None, [_Read]) == {"other"}


def test_a_given_flag_that_is_not_read_is_refused_with_its_value() -> None:
    refuse_unread({"is_on"}, ["some_rate", "other"], "leave it out", _Read())
    with pytest.raises(InvalidArgument, match=r"^--other=3: leave it out$"):
        refuse_unread({"other", "is_on"}, ["some_rate", "other"], "leave it out", _Read(other=3))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("file", ["out/ledger.jsonl", None])
def test_a_full_disk_is_one_line_and_status_2(
    number: int, file: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_, exit_on_invalid_argument():
        raise OSError(number, os.strerror(number), file)
    assert exit_.value.code == 2
    expected = (
        f"error: {os.strerror(number)}: {file or 'a file'} was not written; free space and run the command again\n"
    )
    assert capsys.readouterr().err == expected


def test_a_disk_that_is_really_full_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, exit_on_invalid_argument():
        os.write(os.open("/dev/full", os.O_WRONLY), b"a line")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {os.strerror(errno.ENOSPC)}: ")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_other_errors_of_the_system_keep_their_traceback(number: int) -> None:
    with pytest.raises(OSError, match="name of it") as error, exit_on_invalid_argument():
        raise OSError(number, "name of it")
    assert error.value.errno == number


def test_another_rank_lets_the_main_process_speak_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed_before_waiting: list[str] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(parser.time, "sleep", lambda _: printed_before_waiting.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as exit_, exit_on_invalid_argument():
        _fail()
    assert exit_.value.code == 2
    assert printed_before_waiting == [""]
    assert capsys.readouterr().err == "error on rank 1: --top_p=3: give less\n"


@pytest.mark.parametrize("below", ["file/run", "gone/file", "."])
def test_a_path_that_cannot_be_used_is_one_line(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_, exit_on_invalid_argument():
        (tmp_path / below).open("w")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith(f"{tmp_path / below} cannot be used; check the path and who may read and write it\n")
    assert error.count("\n") == 1
