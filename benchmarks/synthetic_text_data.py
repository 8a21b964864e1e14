"""The data of `synthetic_text.sh`: chat messages to imitate, and medical abstracts with topics to classify.

    python -m benchmarks.synthetic_text_data --chat chat.jsonl --abstracts_train train.jsonl \
        --abstracts_held_out validation.jsonl --output_dir STUDY

writes to STUDY
    chat_train.jsonl, chat_held_out.jsonl                 `instruction`: a user's message
    labelled_abstracts.jsonl, abstracts_held_out.jsonl    `instruction`: a topic, `answer`: the abstract's first words
    how_many.txt, topics.txt                              what to sample: messages, and texts in equal parts over topics

Messages longer than a generator of 64 tokens writes are left out, and one that occurs twice is kept once, before rows
are counted and split. How many of the training abstracts have which topic is private, so every topic is asked for
equally often; that there are these topics is taken to be public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dptune._validate import refuse, require_count
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.files.jsonl import write_jsonl
from utils.files.tables import read_rows

CHAT_TRAIN, CHAT_HELD_OUT = "chat_train.jsonl", "chat_held_out.jsonl"
ABSTRACTS_TRAIN, ABSTRACTS_HELD_OUT = "labelled_abstracts.jsonl", "abstracts_held_out.jsonl"

# What the reviews that the abstracts were collected for are about; two are named after their authors in the file.
TOPIC_NAMES = {
    "ACEInhibitors": "ACE inhibitors",
    "ADHD": "ADHD",
    "Antihistamines": "Antihistamines",
    "AtypicalAntipsychotics": "Atypical antipsychotics",
    "Bannach-Brown_2019": "Animal models of depression",
    "BetaBlockers": "Beta blockers",
    "CalciumChannelBlockers": "Calcium channel blockers",
    "Estrogens": "Estrogens",
    "NSAIDS": "NSAIDs",
    "Nagtegaal_2019": "Nudging health professionals",
    "Opiods": "Opioids",
    "OralHypoglycemics": "Oral hypoglycemics",
    "ProtonPumpInhibitors": "Proton pump inhibitors",
    "SkeletalMuscleRelaxants": "Skeletal muscle relaxants",
    "Triptans": "Triptans",
    "UrinaryIncontinence": "Urinary incontinence",
}


@dataclass
class StudyDataArguments:
    """Which files, and how much of them."""

    chat: str = field(metadata={"help": "JSONL with `instruction`"})
    abstracts_train: str = field(metadata={"help": "JSONL with `topic`, `title`, `text`"})
    abstracts_held_out: str = field(metadata={"help": "the same of other abstracts"})
    output_dir: str = field(metadata={"help": "folder to write to"})
    words: int = field(default=20, metadata={"help": "of title and text together; a title has 13"})
    longest_message: int = field(default=40, metadata={"help": "words of a message; longer ones are left out"})
    held_out_messages: int = field(default=400, metadata={"help": "messages that are not trained on"})
    messages: int = field(default=1000, metadata={"help": "to sample"})
    texts_a_topic: int = field(default=32, metadata={"help": "to sample"})

    def __post_init__(self) -> None:
        for name in ("words", "longest_message", "held_out_messages", "messages", "texts_a_topic"):
            require_count(f"--{name}", getattr(self, name))


def split_messages(messages: Sequence[str], *, longest: int, held_out: int) -> tuple[list[str], list[str]]:
    """(training, held out): each message of at most `longest` words once, in an order drawn with a fixed seed.

    Raises:
        InvalidArgument: nothing would be left to train on.
    """
    once = list(dict.fromkeys(text for text in messages if len(text.split()) <= longest))
    if held_out >= len(once):
        remedy = f"there are {len(once)} different messages of at most {longest} words; hold out fewer"
        refuse("--held_out_messages", held_out, remedy)
    order = np.random.default_rng(0).permutation(len(once))
    return [once[i] for i in order[held_out:]], [once[i] for i in order[:held_out]]


def labelled(path: str, flag: str, words: int) -> list[dict[str, object]]:
    """Rows with a topic's name as the instruction and the first words of title and text as the answer.

    Raises:
        InvalidArgument: a topic that TOPIC_NAMES has no name for.
    """
    rows: list[dict[str, object]] = []
    for row in read_rows(path, flag):
        if row["topic"] not in TOPIC_NAMES:
            refuse(flag, path, f"the topic {row['topic']} has no name in benchmarks/synthetic_text_data.py; add it")
        beginning = f"{row['title']} {row['text']}".split()[:words]
        rows.append({"instruction": TOPIC_NAMES[row["topic"]], "answer": " ".join(beginning)})
    return rows


def main(args: StudyDataArguments) -> None:
    """Write the files."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    messages = [row["instruction"] for row in read_rows(args.chat, "--chat")]
    train, held_out = split_messages(messages, longest=args.longest_message, held_out=args.held_out_messages)
    write_jsonl(folder / CHAT_TRAIN, ({"instruction": text} for text in train))
    write_jsonl(folder / CHAT_HELD_OUT, ({"instruction": text} for text in held_out))
    (folder / "how_many.txt").write_text(f" #### {args.messages}\n")
    write_jsonl(folder / ABSTRACTS_TRAIN, labelled(args.abstracts_train, "--abstracts_train", args.words))
    write_jsonl(folder / ABSTRACTS_HELD_OUT, labelled(args.abstracts_held_out, "--abstracts_held_out", args.words))
    lines = (f"{name} #### {args.texts_a_topic}\n" for name in TOPIC_NAMES.values())
    (folder / "topics.txt").write_text("".join(lines))


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(StudyDataArguments, description=__doc__))
