r"""Sample from a fine-tuned model: print the `accelerate launch` command and run it.

    python -m scripts.generate_inference_command --instruction_file scripts/syn_instruct.txt --model_name_or_path PATH \
        --adapter_path OUT --job_sess debug --block_size 1024 --top_p 0.95 --prompt_style uncond_generation

writes synthetic instructions to `inference_outputs/debug/instructions.jsonl` (type B). With `--prompt_style vicuna` and
AlpacaEval's instructions it writes responses, also in AlpacaEval's format (type D). --print_only only prints the
command. After an interruption run the same line again to resume. Flags after `--` are passed to
inference_generation_instruction.py, such as `-- --stop USER: --seed 1`.

Run it from the repository's root. The exit status is that of the launched command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptune._aliases import aliases
from utils.cli.endpoints import VLLM_KEY, require_address
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.cli.launch_lines import as_command, as_line, launch_words, require_job, require_not_taken, split_at_dashes
from utils.data.prompts import PROMPT_STYLES
from utils.generation.arguments import BACKENDS

SCRIPT = "inference_generation_instruction.py"
OUTPUTS = Path("inference_outputs")


@dataclass
class JobArguments:
    """What to sample; the flags have the same names as in scripts/generate_train_command.py."""

    _argument_group_name = "job"

    instruction_file: str = field(metadata={"help": "instructions: see inference_generation_instruction.py"})
    model_name_or_path: str = field(
        metadata={"help": "folder or hub name of the base model", "aliases": aliases("model_name")}
    )
    job_sess: str = field(metadata={"help": f"name of the job: outputs go to {OUTPUTS}/[job_sess]"})
    adapter_path: str | None = field(
        default=None, metadata={"help": "folder of a training, or its folder publish; default: sample the base model"}
    )
    block_size: int = field(
        default=1024,
        metadata={
            "help": "maximum number of tokens of prompt and text together",
            "aliases": aliases("max_seq_len", "max_length"),
        },
    )
    top_p: float = field(default=0.95, metadata={"help": "sample from the likeliest tokens of this total probability"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature; 0 is greedy decoding"})
    batch_size: int = field(default=8, metadata={"help": "texts generated at once per GPU"})
    prompt_style: str | None = field(
        default=None,
        metadata={"help": "form of the prompt; by default that of the training, or plain", "choices": PROMPT_STYLES},
    )
    gpus: int = field(default=1, metadata={"help": "number of processes, one per GPU; give 1 for a CPU"})
    shard: bool = field(default=False, metadata={"help": "shard the base model over the GPUs"})
    backend: str = field(default="hf", metadata={"help": "generation backend", "choices": BACKENDS})
    vllm_url: str | None = field(default=None, metadata={"help": "address of the server of --backend vllm"})
    print_only: bool = field(default=False, metadata={"help": "print the command, do not run it"})

    def __post_init__(self) -> None:
        require_job(self.job_sess, OUTPUTS, gpus=self.gpus, shard=self.shard)
        if self.vllm_url is not None:
            require_address(self.vllm_url, flag="--vllm_url", key_variable=VLLM_KEY)


# This program's flag -> the flag of the inference script.
_NAMES = {
    "instruction_file": "instruction_file",
    "model_name_or_path": "model_name_or_path",
    "adapter_path": "lora_weights_path",
    "block_size": "max_length",
    "top_p": "top_p",
    "temperature": "temperature",
    "batch_size": "batch_size",
    "prompt_style": "prompt_style",
    "backend": "backend",
    "vllm_url": "vllm_url",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the launch command and, without --print_only, replace this process by it.

    Args:
        argv: the command line; `sys.argv[1:]` if None.
    """
    own, extra = split_at_dashes(sys.argv[1:] if argv is None else argv)
    (job,) = parse(JobArguments, args=own, description=__doc__)
    words = inference_launch(job, extra)
    print(as_line(words), flush=True)
    if not job.print_only:
        command = as_command(words)
        os.execv(command[0], command)  # so exit status and signals need no forwarding


def inference_launch(job: JobArguments, extra: Sequence[str] = ()) -> list[str]:
    """The words after `accelerate launch` for one job.

    Args:
        job: what is sampled.
        extra: more flags of the inference script. Raises `InvalidArgument` for one that the job sets itself.
    """
    require_not_taken(extra, {theirs: f"--{own}" for own, theirs in _NAMES.items()} | {"output_dir": "--job_sess"})
    flags = ["--output_dir", str(OUTPUTS / job.job_sess)]
    for own, theirs in _NAMES.items():
        if (value := getattr(job, own)) is not None:
            flags += [f"--{theirs}", str(value)]
    return launch_words(SCRIPT, [*flags, *extra], gpus=job.gpus, shard=job.shard)


if __name__ == "__main__":
    with exit_on_invalid_argument(JobArguments):
        main()
