"""The examples of a logical step: random tokens, with lengths that are fixed or drawn from real text.

Time depends on lengths, not on words. So the benchmark needs no data, only a table of lengths and their sources
(`lengths.json`). `--text` uses the lengths of your own file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dptune._validate import refuse

IGNORE = -100  # the label of a token without a loss
_TABLE = Path(__file__).with_name("lengths.json")

Length = tuple[int, int]  # tokens without labels (the prompt), tokens with labels
Example = tuple[Tensor, Tensor]  # input_ids [T], labels [T]
Draw = list[Example]  # one logical step


def table(name: str) -> list[Length]:
    """The lengths in the table for one kind of text: `abstracts` or `chat`."""
    tables = json.loads(_TABLE.read_text())
    if name not in tables:
        refuse("--lengths", name, f"give one of {', '.join(tables)}")
    return [(prompt, answer) for prompt, answer in tables[name]["lengths"]]


def measured(text: str, tokenizer: Any) -> list[Length]:
    """Lengths of the rows of a JSONL file with `text`, or `instruction` and `answer`; the end token counts."""
    lengths = []
    for number, line in enumerate(Path(text).read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        prompt, answer = row.get("instruction", ""), row.get("answer", row.get("text"))
        if answer is None:
            refuse("--text", f"{text}:{number}", "has neither `text` nor `answer`; give rows with one of them")
        labelled = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1
        lengths.append((len(tokenizer(prompt)["input_ids"]), labelled))
    if not lengths:
        refuse("--text", text, "has no rows; give a file with rows")
    return lengths


def draws(
    lengths: Sequence[Length], count: int, *, examples: int, block: int, vocabulary: int, seed: int = 0
) -> list[Draw]:
    """`count` draws of `examples` examples each. Lengths are drawn from `lengths` and cut at `block` tokens."""
    rng = np.random.default_rng(seed)
    return [
        [_example(lengths[i], block, vocabulary, rng) for i in rng.integers(len(lengths), size=examples)]
        for _ in range(count)
    ]


def _example(length: Length, block: int, vocabulary: int, rng: np.random.Generator) -> Example:
    prompt, answer = length
    ids = torch.from_numpy(rng.integers(vocabulary, size=min(prompt + answer, block)))
    labels = ids.clone()
    labels[:prompt] = IGNORE
    return ids, labels


def tokens(draw: Draw) -> int:
    """Number of real tokens in a draw. Padding differs between contenders and never counts."""
    return sum(len(ids) for ids, _ in draw)


def padded(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, labels, attention_mask), each [B, T], padded on the right."""
    ids, labels = zip(*examples, strict=True)
    masks = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(list(ids), batch_first=True).to(device),
        pad(list(labels), batch_first=True, padding_value=IGNORE).to(device),
        pad(masks, batch_first=True).to(device),
    )
