"""The data of `synthetic_text.sh`: chat messages to imitate, and medical abstracts to classify by topic.

    python -m benchmarks.synthetic_text_data --chat chat.jsonl --abstracts_train train.jsonl \
        --abstracts_held_out validation.jsonl --output_dir STUDY

writes to STUDY
    chat_train.jsonl, chat_held_out.jsonl                 `instruction`: a user's message
    labelled_abstracts.jsonl, abstracts_held_out.jsonl    `instruction`: a wish with a topic, `answer`: its first words
    how_many.txt, topics.txt                              what to sample: messages, and texts in equal parts over topics

Messages too long for a generator of 64 tokens are left out, and duplicates are removed, before rows are counted and
split. The number of training abstracts per topic is private, so texts are sampled equally over topics. The list of
topics is assumed to be public.
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

# What the models are asked for. A bare topic was not understood as a wish: samples of the untrained model taught a
# classifier nothing (12% right, as by chance), and with a longer wording of this prompt 24% (500 abstracts that no
# result is scored on).
PROMPT = "Title and abstract of a clinical study on {}:"
# Topics of the reviews that the abstracts were collected for; the file names two of them after their authors.
TOPIC_NAMES = {
    "ACEInhibitors": "ACE inhibitors",
    "ADHD": "ADHD",
    "Antihistamines": "antihistamines",
    "AtypicalAntipsychotics": "atypical antipsychotics",
    "Bannach-Brown_2019": "animal models of depression",
    "BetaBlockers": "beta blockers",
    "CalciumChannelBlockers": "calcium channel blockers",
    "Estrogens": "estrogens",
    "NSAIDS": "NSAIDs",
    "Nagtegaal_2019": "nudging health professionals",
    "Opiods": "opioids",
    "OralHypoglycemics": "oral hypoglycemics",
    "ProtonPumpInhibitors": "proton pump inhibitors",
    "SkeletalMuscleRelaxants": "skeletal muscle relaxants",
    "Triptans": "triptans",
    "UrinaryIncontinence": "urinary incontinence",
}


@dataclass
class StudyDataArguments:
    """Files and sizes."""

    chat: str = field(metadata={"help": "JSONL file with `instruction`"})
    abstracts_train: str = field(metadata={"help": "JSONL file with `topic`, `title`, `text`"})
    abstracts_held_out: str = field(metadata={"help": "the same for held-out abstracts"})
    output_dir: str = field(metadata={"help": "folder to write to"})
    words: int = field(default=20, metadata={"help": "words of title and text to keep per abstract"})
    longest_message: int = field(default=40, metadata={"help": "maximum words per message; longer ones are left out"})
    held_out_messages: int = field(default=400, metadata={"help": "number of held-out messages"})
    messages: int = field(default=1000, metadata={"help": "number of messages to sample"})
    texts_a_topic: int = field(default=32, metadata={"help": "number of texts to sample per topic"})

    def __post_init__(self) -> None:
        for name in ("words", "longest_message", "held_out_messages", "messages", "texts_a_topic"):
            require_count(f"--{name}", getattr(self, name))


def split_messages(messages: Sequence[str], *, longest: int, held_out: int) -> tuple[list[str], list[str]]:
    """(training, held out): each message of at most `longest` words once, in a random order with a fixed seed.

    Raises:
        InvalidArgument: no message would be left to train on.
    """
    once = list(dict.fromkeys(text for text in messages if len(text.split()) <= longest))
    if held_out >= len(once):
        remedy = f"there are {len(once)} different messages of at most {longest} words; hold out fewer"
        refuse("--held_out_messages", held_out, remedy)
    order = np.random.default_rng(0).permutation(len(once))
    return [once[i] for i in order[held_out:]], [once[i] for i in order[:held_out]]


def labelled(path: str, flag: str, words: int) -> list[dict[str, object]]:
    """Rows with a wish for the topic as instruction and the first words of title and text as answer.

    Raises:
        InvalidArgument: a topic has no name in TOPIC_NAMES.
    """
    rows: list[dict[str, object]] = []
    for row in read_rows(path, flag):
        if row["topic"] not in TOPIC_NAMES:
            refuse(flag, path, f"the topic {row['topic']} has no name in benchmarks/synthetic_text_data.py; add it")
        beginning = f"{row['title']} {row['text']}".split()[:words]
        rows.append({"instruction": PROMPT.format(TOPIC_NAMES[row["topic"]]), "answer": " ".join(beginning)})
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
    lines = (f"{PROMPT.format(name)} #### {args.texts_a_topic}\n" for name in TOPIC_NAMES.values())
    (folder / "topics.txt").write_text("".join(lines))


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(StudyDataArguments, description=__doc__))
