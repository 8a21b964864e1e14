"""Flags of train_classifier.py: how the classification head starts, and what follows every text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dptune._validate import refuse

WORDS_FLAG, SUFFIX_FLAG = "--label_words", "--prompt_suffix"
AUTO = "auto"


class TaskWords(NamedTuple):
    """Label words of a GLUE task, in the order of its classes.

    Attributes:
        words: what a decoder writes next, after a text and the suffix.
        suffix: the suffix.
        descriptions: texts for an encoder; None if one text cannot describe a class, as in tasks about pairs of texts.
    """

    words: tuple[str, ...]
    suffix: str
    descriptions: tuple[str, ...] | None = None


WORDS_OF_TASK = {
    "sst2": TaskWords(("negative", "positive"), "\nSentiment:", ("a terrible movie", "a great movie")),
}


@dataclass
class HeadArguments:
    """How the classification head starts. Neither flag reads data, so neither changes epsilon."""

    _argument_group_name = "head"

    label_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "one word per class, in the order of the classes: the head starts from the model's own words. For "
            "an encoder give descriptions, each in quotes. auto: words for the GLUE task. Default: random numbers"
        },
    )
    prompt_suffix: str | None = field(
        default=None,
        metadata={
            "help": "what follows every text, also in predictions, such as ' It was': the label word would come next. "
            "Only for decoders; default: nothing, or with --label_words auto that of the task"
        },
    )

    def __post_init__(self) -> None:
        words = self.label_words
        if words is not None:
            if any(not word.strip() for word in words):
                refuse(WORDS_FLAG, in_words(words), "one of them is empty; give a word for each class")
            if len({word.strip() for word in words}) < len(words):
                refuse(WORDS_FLAG, in_words(words), "two classes have the same; give each its own")
        if self.prompt_suffix is not None and not self.prompt_suffix.strip():
            refuse(SUFFIX_FLAG, self.prompt_suffix, "give some words, or leave it out")

    @property
    def is_given(self) -> bool:
        """Whether any of the flags was given."""
        return self.label_words is not None or self.prompt_suffix is not None

    def of_task(self, name: str, *, decoder: bool) -> HeadArguments:
        """The same for one task, with its words instead of `auto`.

        Args:
            name: the task's.
            decoder: whether the model is one.

        Raises:
            InvalidArgument: an encoder with a suffix, or no words are known for the task.
        """
        if self.prompt_suffix is not None and not decoder:
            refuse(
                SUFFIX_FLAG,
                self.prompt_suffix,
                "is for decoders, which read the last token; leave it out, and give an encoder whole descriptions",
            )
        if self.label_words != [AUTO]:
            return self
        known = WORDS_OF_TASK.get(name)
        words = None if known is None else known.words if decoder else known.descriptions
        if known is None or words is None:
            kind = "a decoder" if decoder else "an encoder"
            refuse(WORDS_FLAG, AUTO, f"no words are known for {name} and {kind}; give one for each class")
        suffix = (self.prompt_suffix or known.suffix) if decoder else None
        return replace(self, label_words=list(words), prompt_suffix=suffix)

    def require_one_each(self, class_names: Sequence[str], task: str) -> None:
        """Refuse another number of words than there are classes."""
        words = self.label_words
        if words is not None and len(words) != len(class_names):
            told = f"there are {len(words)}, but {task} has {len(class_names)} classes: {', '.join(class_names)}"
            refuse(WORDS_FLAG, in_words(words), f"{told}; give one for each, in that order")


def in_words(words: Sequence[str]) -> str:
    """Label words for a message, apart from each other."""
    return ", ".join(words)
