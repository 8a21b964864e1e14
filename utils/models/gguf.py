"""Models in GGUF, the file format of llama.cpp: found by name, loaded with dense weights, or converted once.

transformers reads the file itself, for the architectures and quantisations that it knows. Its weights become dense, so
they can be trained on and merged with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from dptune._validate import refuse

SUFFIX = ".gguf"
REMEDY = "transformers must know a GGUF file's architecture and quantisation; else give the model that it was made from"


class GgufSource(NamedTuple):
    """Where a model is: what `from_pretrained` takes first, and the GGUF file in that folder, if it is one."""

    place: str
    file: str | None = None

    @property
    def which(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained` of a configuration or tokenizer."""
        return {} if self.file is None else {"gguf_file": self.file}

    @property
    def dense(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained` of a model. Blocks of GGUF cannot be trained on or saved."""
        return {} if self.file is None else {"gguf_file": self.file, "quantization_config": GgufConfig(dequantize=True)}


def source_of(name: str) -> GgufSource:
    """Where the model of a folder, a hub name, a GGUF file, or a folder that holds one GGUF file is.

    Raises:
        InvalidArgument: the folder holds several GGUF files and no other model.
    """
    path = Path(name)
    if path.suffix.lower() == SUFFIX and path.is_file():
        return GgufSource(str(path.parent), path.name)
    if not path.is_dir() or (path / "config.json").exists():
        return GgufSource(name)
    files = sorted(one.name for one in path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        refuse("--model_name_or_path", name, f"holds {len(files)} GGUF files: {', '.join(files)}; give one of them")
    return GgufSource(name, files[0] if files else None)


def refuse_gguf(name: str, flag: str, reason: str) -> None:
    """Refuse a GGUF file where it cannot be read directly, with the line that converts it."""
    if source_of(name).file is not None:
        refuse(flag, name, f"{reason}; give the folder of: python -m scripts.convert_gguf {name} --output_dir FOLDER")


def read_tokenizer(source: GgufSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file."""
    tokenizer = AutoTokenizer.from_pretrained(source.place, **source.which)
    end = AutoConfig.from_pretrained(source.place, **source.which).eos_token_id
    if isinstance(end, int):  # transformers 5.17 takes the file's begin token for the end token too
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def convert(file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, which exists, as `from_pretrained` reads them."""
    source = GgufSource(str(file.parent), file.name)
    model = AutoModelForCausalLM.from_pretrained(source.place, dtype=dtype, **source.dense)
    model.save_pretrained(folder)
    read_tokenizer(source).save_pretrained(folder)
