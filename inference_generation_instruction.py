r"""Sample texts for the instructions of a file, each as often as the file says.

Launch:

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg \
        inference_generation_instruction.py --model_name_or_path PATH --lora_weights_path OUT/lora_weights.bin \
        --instruction_file scripts/example_instruction_file.txt --max_length 512 --output_dir generation_test

A line of the file is `instruction #### repetitions`; blank lines are skipped. Within an instruction \n stands for a
line break and \\ for a backslash. The last #### of a line counts, so an instruction may hold others.

Writes `generations.jsonl` to --output_dir: a line a text with prompt, text, index, and ended (the model closed it
itself; otherwise it was cut at --max_length). Run the same line again to continue after an interruption.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import refuse
from utils.arguments import AdapterArguments, ModelArguments, SamplingArguments, exit_on_invalid_argument, parse
from utils.generation import sample_instructions

SEPARATOR = "####"
_ESCAPES = {r"\n": "\n", r"\\": "\\"}


@dataclass
class InstructionArguments:
    """Which instructions."""

    _argument_group_name = "prompts"

    instruction_file: str = field(metadata={"help": "text file with a line `instruction #### repetitions` each"})


def read_instructions(path: str) -> list[str]:
    """The instructions of a file in its order, each repeated as its line says.

    Raises `InvalidArgument` with the line's number for a line without separator or whose repetitions are not a whole
    number of at least 1, and for a file that cannot be read as UTF-8 text or holds no instruction.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse("--instruction_file", path, f"cannot be read ({type(error).__name__}); give a text file in UTF-8")
    lines = enumerate(text.split("\n"), start=1)
    instructions = [one for number, line in lines if line.strip() for one in _read_line(path, number, line)]
    if not instructions:
        refuse("--instruction_file", path, f"holds no instruction; write lines `instruction {SEPARATOR} repetitions`")
    return instructions


def _read_line(path: str, number: int, line: str) -> list[str]:
    """The instruction of one line as often as it says."""
    instruction, separator, repetitions = line.rpartition(SEPARATOR)
    if not separator:
        refuse(
            "--instruction_file", path, f"line {number} has no {SEPARATOR}; write `instruction {SEPARATOR} repetitions`"
        )
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", repetitions.strip(), re.ASCII):
        given = repetitions.strip() or "nothing"
        refuse("--instruction_file", path, f"line {number} has {given} after {SEPARATOR}; write a whole number from 1")
    unescaped = re.sub(r"\\[n\\]", lambda found: _ESCAPES[found[0]], instruction.strip())
    return [unescaped] * int(repetitions)


def main(
    prompts: InstructionArguments, model: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> None:
    """Draw the texts that the instruction file asks for."""
    sample_instructions(read_instructions(prompts.instruction_file), model, adapter, sampling)


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(InstructionArguments, ModelArguments, AdapterArguments, SamplingArguments, description=__doc__))
