"""Flags of train_classifier.py: how the classification head starts, and which words end every text."""

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
        words: for a decoder, which would write one of them after a text and the suffix.
        suffix: what is appended to every text of a decoder.
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
            "help": "one word per class, in the order of the classes: the classification head starts from what the "
            "model knows of these words. For an encoder, give a short description per class, each in quotes. auto: "
            f"built-in words, which exist for {', '.join(WORDS_OF_TASK)}. Default: the head starts from random numbers"
        },
    )
    prompt_suffix: str | None = field(
        default=None,
        metadata={
            "help": "words to append to every text, in training and in predictions, such as ' It was'; the model then "
            "expects a label word next. Only for decoders. Default: nothing; with --label_words auto, built-in words"
        },
    )

    def __post_init__(self) -> None:
        words = self.label_words
        if words is not None:
            if any(not word.strip() for word in words):
                refuse(WORDS_FLAG, words_listed(words), "one of the words is empty; give one word per class")
            if len({word.strip() for word in words}) < len(words):
                refuse(WORDS_FLAG, words_listed(words), "two classes have the same word; give each class its own")
        if self.prompt_suffix is not None and not self.prompt_suffix.strip():
            refuse(SUFFIX_FLAG, self.prompt_suffix, "holds only white space; give some words, or leave it out")

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
                "works only with decoders, and this model is an encoder; leave it out, and describe each class in "
                "--label_words",
            )
        if self.label_words != [AUTO]:
            return self
        known = WORDS_OF_TASK.get(name)
        words = None if known is None else known.words if decoder else known.descriptions
        if known is None or words is None:
            kind = "a decoder" if decoder else "an encoder"
            refuse(WORDS_FLAG, AUTO, f"there are no built-in words for {name} with {kind}; give one per class")
        suffix = (self.prompt_suffix or known.suffix) if decoder else None
        return replace(self, label_words=list(words), prompt_suffix=suffix)

    def require_one_each(self, class_names: Sequence[str], task: str) -> None:
        """Refuse another number of words than there are classes."""
        words = self.label_words
        if words is not None and len(words) != len(class_names):
            told = f"there are {len(words)} words, but {task} has {len(class_names)} classes: {', '.join(class_names)}"
            refuse(WORDS_FLAG, words_listed(words), f"{told}; give one per class, in that order")


def words_listed(words: Sequence[str]) -> str:
    """Label words for a message, separated by commas."""
    return ", ".join(words)
