"""Files that keep replies during a run: an interrupted run resumes, and nothing is asked twice.

Every reply is a line of `answers.jsonl`, which is on disk before the next question. `annotation_config.json` records
the settings, so that a folder never mixes inputs, models or settings. `annotated.jsonl`, `set_aside.jsonl` and
`summary.json` are written once every row is answered or set aside.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.annotation.replies import Reply
from utils.files.journal import Journal
from utils.files.jsonl import write_json, write_jsonl
from utils.files.tables import Row

JOURNAL_NAME = "answers.jsonl"
ANNOTATED_NAME, SET_ASIDE_NAME, SUMMARY_NAME = "annotated.jsonl", "set_aside.jsonl", "summary.json"
_TOKENS_A_PRICE = 1_000_000


@dataclass(frozen=True)
class Question:
    """One instruction to answer.

    Attributes:
        key: digest of the row's id, instruction and request settings; rows with the same key share one answer.
        row: the whole row; its `instruction` and `id` are texts.
    """

    key: str
    row: Row

    @property
    def instruction(self) -> str:
        """The text to answer."""
        return str(self.row["instruction"])


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in any currency; None if unknown."""

    prompt: float | None = None
    completion: float | None = None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """The cost of so many tokens; None unless both prices are known."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / _TOKENS_A_PRICE


def make_questions(rows: Iterable[Row], settings: Mapping[str, Any]) -> list[Question]:
    """The questions of rows that have `instruction` and `id`, in their order.

    Args:
        rows: checked rows.
        settings: request settings (model, token limit and so on), JSON values by name.
    """
    shared = json.dumps(dict(settings), sort_keys=True)
    return [Question(_digest([row["id"], row["instruction"], shared]), row) for row in rows]


def annotation_identity(questions: Sequence[Question], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers in a folder depend on, as JSON values."""
    keys = [question.key for question in questions]
    return {**settings, "num_rows": len(questions), "input_sha256": _digest(keys)}


class ReplyJournal:
    """The replies of a folder.

    Args:
        folder: the folder of --output_dir.
    """

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(folder, "annotation_config.json", (JOURNAL_NAME,), "answers")

    def claim(self, identity: Mapping[str, Any]) -> None:
        """`utils.files.journal.Journal.claim`."""
        self._journal.claim(identity)

    def add(self, question: Question, reply: Reply) -> None:
        """Save a reply; it is on disk when this returns."""
        self._journal.append(JOURNAL_NAME, {"key": question.key, "id": question.row["id"], **asdict(reply)})

    def entries(self) -> Iterator[tuple[str, Reply]]:
        """(key, reply) of every complete line, in the order of writing."""
        for row in self._journal.rows():
            yield row["key"], Reply(**{name: row[name] for name in Reply.__dataclass_fields__})

    def settled(self, *, answered_only: bool = False) -> dict[str, Reply]:
        """The last reply to each question. `answered_only` leaves out replies without an answer, to ask again."""
        last = dict(self.entries())
        return {key: reply for key, reply in last.items() if not answered_only or reply.answer is not None}


def write_annotations(
    folder: Path, questions: Sequence[Question], journal: ReplyJournal, settings: Mapping[str, Any], prices: Prices
) -> dict[str, Any]:
    """Write the answered rows, the rows set aside, and the summary, which is returned.

    Args:
        folder: the run's folder.
        questions: all questions, in the order of the input; each must have a reply.
        journal: holds the replies.
        settings: the request settings, for the summary.
        prices: for the cost.
    """
    settled = journal.settled()
    replies = [(question.row, settled[question.key]) for question in questions]
    annotated = ({**row, "answer": reply.answer} for row, reply in replies if reply.answer is not None)
    set_aside = ({**row, "reason": reply.reason} for row, reply in replies if reply.answer is None)
    write_jsonl(folder / ANNOTATED_NAME, annotated)
    write_jsonl(folder / SET_ASIDE_NAME, set_aside)
    reasons = Counter(reply.reason for _, reply in replies if reply.answer is None)
    summary = {
        **settings,
        "answered_by": sorted({reply.model for _, reply in replies if reply.model is not None}),
        "rows": len(replies),
        "answered": len(replies) - reasons.total(),
        "set_aside": reasons.total(),
        "reasons": dict(reasons.most_common()),
        **count_tokens((reply for _, reply in journal.entries()), prices),
    }
    write_json(folder / SUMMARY_NAME, summary)
    return summary


def count_tokens(replies: Iterable[Reply], prices: Prices) -> dict[str, Any]:
    """Tokens and cost of all replies, including those without a usable answer, which cost money too."""
    paid = list(replies)
    prompt = sum(reply.prompt_tokens or 0 for reply in paid)
    completion = sum(reply.completion_tokens or 0 for reply in paid)
    return {
        "replies": len(paid),
        "replies_without_token_counts": sum(reply.prompt_tokens is None for reply in paid),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": prices.cost(prompt, completion),
        "price_per_million_input": prices.prompt,
        "price_per_million_output": prices.completion,
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
