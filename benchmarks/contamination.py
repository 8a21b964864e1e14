"""How much of a file a base model already knows by heart, before any of our training.

    python -m benchmarks.contamination --model_name_or_path MODEL --file held_out.jsonl --output contamination.json

A model that had the test texts in its pre-training would make samples look better than they are. The model continues
each text's beginning greedily, and the tokens that it gets right in a row are counted: the test of Carlini et al., 2023
(Quantifying memorization across neural language models), which calls a text memorised if 50 tokens after a beginning
of 50 are all right. A text that was seen, but not learned by heart, is not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

from dptune._validate import refuse, require_count
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.files.jsonl import write_json
from utils.files.tables import read_rows
from utils.models.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTAMINATION_NAME = "contamination.json"


@dataclass
class ContaminationArguments:
    """The model, the texts and the lengths."""

    model_name_or_path: str = field(metadata={"help": "folder or hub name of the base model"})
    file: str = field(metadata={"help": "texts that it should not know: rows with the --columns"})
    output: str = field(metadata={"help": "JSON file for the result"})
    columns: list[str] = field(
        default_factory=lambda: ["title", "text"], metadata={"help": "columns that make a text, joined by a space"}
    )
    beginning: int = field(default=50, metadata={"help": "number of tokens that the model is given"})
    continuation: int = field(default=50, metadata={"help": "number of tokens that it must continue"})
    batch_size: int = field(default=32, metadata={"help": "number of texts at once"})

    def __post_init__(self) -> None:
        for name in ("beginning", "continuation", "batch_size"):
            require_count(f"--{name}", getattr(self, name))


@dataclass(frozen=True)
class Continued:
    """How well a model continued texts.

    Attributes:
        texts: number of texts that were long enough.
        too_short: number of texts that were not.
        beginning, continuation: numbers of tokens.
        in_a_row: per text, how many tokens it got right before the first wrong one.
    """

    texts: int
    too_short: int
    beginning: int
    continuation: int
    in_a_row: list[int]

    def in_words(self) -> str:
        """One paragraph for a result page."""
        whole = sum(count == self.continuation for count in self.in_a_row)
        mean = sum(self.in_a_row) / self.texts
        return (
            f"Contamination of the base model with the held-out texts: after {self.beginning} tokens of a text it "
            f"continued {whole} of {self.texts:,} for {self.continuation} tokens without a mistake. It got {mean:.1f} "
            f"tokens right in a row on average and {max(self.in_a_row)} at most. {self.too_short:,} texts were too "
            "short for this test. It finds what is known by heart, not all that was ever read."
        )


def texts_of(args: ContaminationArguments) -> list[str]:
    """The texts of the file.

    Raises:
        InvalidArgument: a row lacks one of the columns.
    """
    texts = []
    for number, row in enumerate(read_rows(args.file, "--file"), start=1):
        if missing := [name for name in args.columns if name not in row]:
            refuse(
                "--columns",
                " ".join(args.columns),
                f"row {number} has no {missing[0]}; name columns that all rows have",
            )
        texts.append(" ".join(str(row[name]) for name in args.columns))
    return texts


def right_in_a_row(written: torch.Tensor, real: torch.Tensor) -> list[int]:
    """Per row of two token tensors [B, T], how many tokens are equal before the first that differs."""
    counts: list[int] = (written == real).long().cumprod(dim=1).sum(dim=1).tolist()
    return counts


@torch.inference_mode()
def continue_texts(model: PreTrainedModel, texts: Sequence[Sequence[int]], args: ContaminationArguments) -> Continued:
    """Continue each text's beginning greedily and compare with the rest.

    Raises:
        InvalidArgument: no text is long enough.
    """
    length = args.beginning + args.continuation
    long = [list(text[:length]) for text in texts if len(text) >= length]
    if not long:
        refuse("--file", args.file, f"has no text of {length} tokens; give a lower --beginning or --continuation")
    counts: list[int] = []
    for first in range(0, len(long), args.batch_size):
        ids = torch.tensor(long[first : first + args.batch_size], device=model.device)
        begun = ids[:, : args.beginning]
        written = model.generate(
            input_ids=begun,
            attention_mask=torch.ones_like(begun),
            do_sample=False,
            min_new_tokens=args.continuation,
            max_new_tokens=args.continuation,
        )
        counts += right_in_a_row(written[:, args.beginning :], ids[:, args.beginning :])
    return Continued(len(long), len(texts) - len(long), args.beginning, args.continuation, counts)


def main(args: ContaminationArguments) -> None:
    """Continue the texts; write and print the result."""
    whole = texts_of(args)
    model = load_model(args.model_name_or_path, dtype=torch.float32, device="cpu")
    encode = load_tokenizer(args.model_name_or_path)
    result = continue_texts(model, [encode(text)["input_ids"] for text in whole], args)
    write_json(args.output, asdict(result))
    print(result.in_words())


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(ContaminationArguments, description=__doc__))
