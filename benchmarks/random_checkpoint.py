"""Writes a Llama or GPT-2 with random weights, and a tokenizer for it, as a folder that every program here loads.

    python -m benchmarks.random_checkpoint --shape llama-7b --dtype bfloat16 --output_dir FOLDER

Needs no download: the tokenizer is made on the spot. A text is its bytes, one token each. The rest of the vocabulary,
which no text uses, has made-up words, so that whatever a random model samples can be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import devices
from benchmarks.models import DTYPES, SHAPES, load
from dptune._validate import refuse
from utils.cli.flags import exit_on_invalid_argument, parse

_SPECIAL = ("<unk>", "<s>", "</s>")  # the numbers that a Llama's configuration gives them


@dataclass
class CheckpointArguments:
    """What to write."""

    _argument_group_name = "checkpoint"

    shape: str = field(metadata={"help": "shape of the model", "choices": list(SHAPES)})
    output_dir: str = field(metadata={"help": "folder to write to"})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the weights", "choices": list(DTYPES)})
    device: str = field(default="auto", metadata={"help": "device that makes the weights, which takes long on a CPU"})

    def __post_init__(self) -> None:
        self.device = devices.choose(self.device)


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` tokens: special ones, bytes, and made-up words.

    Raises:
        InvalidArgument: there is no room for the bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_SPECIAL, *letters]
    if vocab_size < len(tokens):
        refuse("vocab_size", vocab_size, f"give at least {len(tokens)}: the bytes and {len(_SPECIAL)} special tokens")
    tokens += [f"word{number}" for number in range(vocab_size - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=_SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    unknown, begin, end = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end)


def write(shape: str, folder: Path, *, dtype: str, device: torch.device) -> None:
    """Write the model and its tokenizer to `folder`."""
    model = load(None, shape, dtype=dtype, device=device)
    model.save_pretrained(folder)
    byte_tokenizer(model.config.vocab_size).save_pretrained(folder)


def main(args: CheckpointArguments) -> None:
    """Write the folder."""
    write(args.shape, Path(args.output_dir), dtype=args.dtype, device=torch.device(args.device))


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(CheckpointArguments, description=__doc__))
