"""Files of flags: what they mean, what is refused, and that the file which a run leaves says the same again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dptune._aliases import aliases
from dptune._validate import InvalidArgument
from utils.classification.arguments import CLASSIFIER_GROUPS, Settings
from utils.cli.flags import given_fields, parse, public_config
from utils.cli.settings_file import SETTINGS_NAME, read_settings_file, split_config, write_settings
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups

TOKEN = "hf_abcdefghijklmnop"


@dataclass
class RunArguments:
    """A flag of each kind."""

    name: str
    rate: float = 1e-3
    steps: int | None = field(default=None, metadata={"aliases": aliases("max_steps", "num_steps")})
    keep: int | None = 2
    is_on: bool = True
    day: str = "2000-01-01"
    style: str = field(default="plain", metadata={"choices": ("plain", "no")})
    files: list[str] | None = None
    access_token: str | None = field(default=None, repr=False, metadata={"help": "safer in HF_TOKEN"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def parsed(file: Path, text: str, *line: str) -> RunArguments:
    file.write_text(text)
    (found,) = parse(RunArguments, args=["--config", str(file), *line])
    assert isinstance(found, RunArguments)
    return found


def test_a_key_may_be_an_older_name(file: Path) -> None:
    assert parsed(file, "name: a\nmax-steps: 3\n").steps == 3
    assert parsed(file, "name: a\nmax_steps: 3\n", "--steps", "4").steps == 4  # the command line overrides
    assert given_fields(["--config", str(file)], [RunArguments]) == {"name", "steps"}
    with pytest.raises(InvalidArgument, match="num_steps is another name of max_steps, which it also holds; keep one"):
        parsed(file, "name: a\nmax_steps: 3\nnum_steps: 3\n")


def test_values_are_read_as_words_of_a_command_line_are(file: Path) -> None:
    text = """
        name: 007          # no number: as written
        rate: 1e-6         # which YAML 1.1 takes for text
        steps: 12
        is-on: false
        day: 2024-02-29    # no date
        style: no          # no boolean
        files: [a b.json, "-c.json"]
    """.replace("\n        ", "\n")
    with pytest.raises(InvalidArgument, match="no value of a list may begin with a hyphen"):
        parsed(file, text)
    found = parsed(file, text.replace('"-c.json"', "c.json"))
    assert found == RunArguments("007", 1e-6, 12, 2, False, "2024-02-29", "no", ["a b.json", "c.json"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: -n", RunArguments("-n")),
        ("name: --rate", RunArguments("--rate")),
        ('name: ""', RunArguments("")),
        ("name: a\nfiles: b", RunArguments("a", files=["b"])),
        ("name: a\nfiles: [--b]", RunArguments("a", files=["--b"])),
        ("name: a\nfiles:\n  - b\n  - -1", RunArguments("a", files=["b", "-1"])),
        ("name: a\nsteps: null\nfiles:", RunArguments("a")),
        ("name: a\nis_on: yes", RunArguments("a")),
        ("name: &n größer\nday: *n", RunArguments("größer", day="größer")),
    ],
)
def test_every_value_that_a_flag_takes_can_stand_in_a_file(file: Path, text: str, expected: RunArguments) -> None:
    assert parsed(file, text) == expected


@pytest.mark.parametrize("line", [["--rate", "0.5", "--no_is_on"], ["--rate=0.5", "--is-on=false"]])
def test_the_command_line_overrides_the_file_wherever_it_stands(file: Path, line: list[str]) -> None:
    file.write_text("name: a\nrate: 0.1\nis_on: true\nfiles: [b, c]")
    for args in ([*line, "--config", str(file)], [f"--config={file}", *line]):
        (found,) = parse(RunArguments, args=[*args, "--files", "d"])
        assert found == RunArguments("a", 0.5, is_on=False, files=["d"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nam: a", "unknown key: nam (did you mean name?); --help lists the flags, whose names are the keys"),
        ("colour: a", "unknown key: colour; --help"),
        ("true: a", "unknown key: true"),
        ("[a]: b", "the key in line 1 is no flag name"),
        ("name: a\nname: b", "name stands twice, again in line 2; keep one"),
        ("is-on: true\nname: a\nis_on: true", "is_on stands twice, again in line 3; keep one"),
        ("rate: fast", "rate='fast': invalid float value: 'fast'"),
        ("steps: 1.5", "steps='1.5': invalid int value: '1.5'"),
        ("is_on: maybe", "is_on='maybe': give true or false, not 'maybe'"),
        ("style: odd", "style='odd': invalid choice: 'odd'"),
        ("name: [a, b]", "name=['a', 'b']: give one value, not a list"),
        ("files: []", "files=[]: give at least one value, or leave the key out"),
        ("name: {a: b}", "name holds more than one value or a list of values"),
        ("files: [[a]]", "files holds more than one value or a list of values"),
        ("keep: null", "keep has no value; give one, or leave the key out"),
        ("name:", "name has no value; give one, or leave the key out"),
        ("", "holds no flags; write them as `learning_rate: 3e-4`, one on each line"),
        ("- name", "holds no flags; write them"),
        ("name: a: b", "is not YAML (mapping values are not allowed here in line 1)"),
        ("name: a\n---\nname: b", "is not YAML (but found another document"),
        ("name: \x00", "is not YAML (unreadable)"),
    ],
)
def test_a_mistake_in_the_file_is_refused_with_file_and_key(file: Path, text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parsed(file, text)
    assert str(caught.value).startswith(f"--config={str(file)!r}: {complaint}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            f"access_token: {TOKEN}",
            "access_token is a secret, which no file should hold: remove it (safer in HF_TOKEN)",
        ),
        (f"hf_token: {TOKEN}", "unknown key: hf_token (did you mean access_token?)"),
        (f"access_token: {TOKEN}: x", "is not YAML"),
        (f"access_token: [{TOKEN}", "is not YAML"),
    ],
)
def test_a_secret_is_refused_and_never_shown(file: Path, text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--config=") as caught:
        parsed(file, text)
    assert complaint in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"name: \xff")
    with pytest.raises(InvalidArgument, match="it is not text in UTF-8"):
        read_settings_file(str(file))
    for missing in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InvalidArgument, match="cannot be read"):
            parse(RunArguments, args=["--config", str(missing)])


def test_files_are_taken_out_of_the_line_in_order() -> None:
    assert split_config(["--a", "--config", "x", "b"]) == (["x"], ["--a", "b"])
    assert split_config(["--config=x=y", "--config", "z"]) == (["x=y", "z"], [])
    for line in (["--config", "x", "--config=x"], ["--a", "--config"]):
        with pytest.raises(InvalidArgument, match=r"^--config"):
            split_config(line)


def test_a_later_file_overrides_an_earlier_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("name: a\nrate: 0.5\nsteps: 3")
    file.write_text("rate: 0.25")
    args = ["--config", str(tmp_path / "first.yaml"), "--config", str(file), "--steps", "4"]
    assert parse(RunArguments, args=args) == (RunArguments("a", 0.25, 4),)
    assert given_fields(args, [RunArguments]) == {"name", "rate", "steps"}


def test_a_recipe_is_found_from_any_folder_and_a_file_of_the_users_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("recipes/rows/10k.yaml")
    assert read_settings_file(str(recipe))["num_train_epochs"] == "10"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("num_train_epochs: 3")
    assert read_settings_file(str(recipe)) == {"num_train_epochs": "3"}


def test_keys_of_the_file_count_as_given_unless_they_hold_the_default(file: Path) -> None:
    file.write_text("name: a\nrate: 0.001\nsteps: null\nis-on: false\nkeep: 2")
    args = [f"--config={file}", "--day", "2000-01-01"]
    assert given_fields(args, [RunArguments]) == {"name", "is_on", "day"}


PRIVATE = ["--noise_multiplier", "0.8", "--lora_target_modules", "q_proj", "v_proj", "--train_file", "a b.json"]
PLAIN = ["--clip_norm", "-1", "--noise_multiplier", "-1", "--no_eval_at_start", "--train_file", "a", "b"]


@pytest.mark.parametrize("line", [PRIVATE, PLAIN])
def test_the_file_that_a_run_leaves_gives_the_same_flags_and_holds_no_token(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    needed = ["--model_name_or_path", "m", "--output_dir", "o", "--access_token", TOKEN]
    first = Groups(*parse(*CAUSAL_LM_GROUPS, args=[*needed, *line]))
    write_settings(tmp_path, public_config(*first))
    args = ["--config", str(tmp_path / SETTINGS_NAME)]
    again = Groups(*parse(*CAUSAL_LM_GROUPS, args=args))
    assert TOKEN not in (tmp_path / SETTINGS_NAME).read_text()
    assert public_config(*again) == public_config(*first)
    again.refuse_unread(given_fields(args, CAUSAL_LM_GROUPS))  # says no more than the command line did


def test_a_flag_in_the_file_that_is_not_read_is_refused(file: Path) -> None:
    file.write_text(
        "model_name_or_path: m\noutput_dir: o\ntrain_file: a\nclip_norm: -1\nnoise_multiplier: -1\ndelta: 0.1"
    )
    args = ["--config", str(file)]
    groups = Groups(*parse(*CAUSAL_LM_GROUPS, args=args))
    with pytest.raises(InvalidArgument, match=r"^--delta=0.1: is not read without privacy"):
        groups.refuse_unread(given_fields(args, CAUSAL_LM_GROUPS))


@pytest.mark.parametrize("line", [["--enable_dp", "--target_epsilon", "3"], []])
def test_a_classifiers_file_gives_the_same_flags(line: list[str], tmp_path: Path) -> None:
    first = parse(*CLASSIFIER_GROUPS, args=["--datasets", "sst2", "qnli", *line])
    write_settings(tmp_path, public_config(*first))
    args = ["--config", str(tmp_path / SETTINGS_NAME)]
    assert parse(*CLASSIFIER_GROUPS, args=args) == first
    Settings(*first).refuse_unread(given_fields(args, CLASSIFIER_GROUPS))
