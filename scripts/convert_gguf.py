r"""Convert a GGUF file once to safetensors with a tokenizer, for sharding, for --qbits and for other programs.

    python -m scripts.convert_gguf model.gguf --output_dir model

Quantised weights become dense ones with the same values. The folder appears when it is complete. Where no sharding is
needed, --model_name_or_path model.gguf works without a conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import refuse
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.files.folders import require_new_folder


@dataclass
class ConversionArguments:
    """What to convert, and where it goes."""

    _argument_group_name = "conversion"

    gguf_file: str = field(metadata={"help": "the GGUF file, or a folder that holds one", "positional": True})
    output_dir: str = field(metadata={"help": "folder for the model; must not exist, or be empty"})
    dtype: str = field(
        default="float32",
        metadata={"help": "data type of the weights", "choices": ("float32", "bfloat16", "float16")},
    )

    def __post_init__(self) -> None:
        require_new_folder(self.output_dir)


GROUPS = (ConversionArguments,)


@exit_on_invalid_argument(*GROUPS, flags={"model_name_or_path": "GGUF_FILE"})
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert the file."""
    (given,) = parse(*GROUPS, args=argv, description=__doc__)
    # Imported here, so that --help and a mistyped flag need neither torch nor transformers.
    import torch

    from dptune._files import write_folder
    from utils.models.gguf import REMEDY, convert, source_of
    from utils.models.loading import refuse_to_load

    source = source_of(given.gguf_file)
    if source.file is None:
        refuse("GGUF_FILE", given.gguf_file, "is neither a GGUF file nor a folder that holds one; check the path")
    file, dtype = Path(source.place) / source.file, getattr(torch, given.dtype)
    try:
        write_folder(Path(given.output_dir), lambda folder: convert(file, folder, dtype))
    except (ImportError, KeyError, NotImplementedError, ValueError) as error:  # what transformers raises for a file
        refuse_to_load("model", str(file), error, remedy=REMEDY)
    print(f"converted              {given.output_dir}")


if __name__ == "__main__":
    main()
