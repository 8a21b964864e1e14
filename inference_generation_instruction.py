r"""Sample texts for the instructions in a file, each as often as the file says.

Launch:

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg \
        inference_generation_instruction.py --model_name_or_path PATH --lora_weights_path OUT/publish \
        --instruction_file scripts/example_instruction_file.txt --max_length 512 --output_dir generation_test

The file has lines `instruction #### repetitions` or one instruction per line, or it is a JSON list of strings, JSONL
with `instruction`, or AlpacaEval's JSON. In a file of lines, blank lines are skipped, \n is a line break and \\ a
backslash. Only the last #### of a line separates, so an instruction may contain ####.

Writes to --output_dir: `generations.jsonl`, `summary.json` with counts, `instructions.jsonl` (with --deduplicate or
--prompt_style uncond_generation) and `alpaca_eval.json` (for AlpacaEval's instructions or with --alpaca_eval_output).
Each line of `generations.jsonl` has prompt, text, index and ended (true if the text ended with an end token or a --stop
string, false if it was cut at --max_length). After an interruption run the same line again to resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from utils.cli.flags import exit_on_invalid_argument, parse
from utils.data.instruction_files import INSTRUCTION_FORMATS, read_instructions
from utils.generation.arguments import SAMPLING_FLAGS, AdapterArguments, SamplingArguments
from utils.models.arguments import ModelArguments


@dataclass
class InstructionArguments:
    """The instructions."""

    _argument_group_name = "prompts"

    instruction_file: str = field(
        metadata={"help": "file with lines `instruction #### repetitions` or one instruction per line, or JSON"}
    )
    instruction_format: str = field(
        default="auto", metadata={"help": "format of the file; auto decides by content", "choices": INSTRUCTION_FORMATS}
    )
    alpaca_eval_output: bool = field(
        default=False,
        metadata={"help": "also write alpaca_eval.json; always on for instructions in AlpacaEval's format"},
    )
    generator_name: str | None = field(
        default=None, metadata={"help": "the model's name in alpaca_eval.json; default: the name of the output folder"}
    )


GROUPS = (InstructionArguments, ModelArguments, AdapterArguments, SamplingArguments)


def main(
    prompts: InstructionArguments, model: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> None:
    """Generate the texts that the instruction file asks for."""
    from utils.generation.outputs import write_alpaca_eval
    from utils.generation.run import sample_instructions

    file = read_instructions(prompts.instruction_file, prompts.instruction_format)
    path = sample_instructions(file.texts, model, adapter, sampling)
    if path is not None and (prompts.alpaca_eval_output or file.format == "alpaca_eval"):
        print(write_alpaca_eval(path, file.instructions, prompts.generator_name or path.resolve().parent.name))


if __name__ == "__main__":
    with exit_on_invalid_argument(*GROUPS, flags=SAMPLING_FLAGS):
        main(*parse(*GROUPS, description=__doc__))
