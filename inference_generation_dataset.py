r"""Sample synthetic texts from the prompt of a data set, in the style of the adapter's training data.

Launch:

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg inference_generation_dataset.py \
        --dataset_name pubmed_generation --model_name_or_path PATH --lora_weights_path OUT/publish \
        --num_samples 100 --max_length 512 --output_dir generations

Writes to --output_dir: `generations.jsonl`, `summary.json` with counts and, with --deduplicate, `instructions.jsonl`.
Each line of `generations.jsonl` has prompt, text, index and ended (true if the text ended with an end token or a --stop
string, false if it was cut at --max_length). After an interruption run the same line again to resume. Reads no data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import require_count
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.data.prompts import PUBMED_PROMPT
from utils.generation.arguments import SAMPLING_FLAGS, AdapterArguments, SamplingArguments
from utils.models.arguments import ModelArguments

PROMPTS = {"pubmed_generation": PUBMED_PROMPT}


@dataclass
class DatasetPromptArguments:
    """The prompt, and the number of texts."""

    _argument_group_name = "prompts"

    dataset_name: str = field(metadata={"help": "data set whose prompt is used", "choices": tuple(PROMPTS)})
    num_samples: int = field(default=100, metadata={"help": "number of texts to generate"})

    def __post_init__(self) -> None:
        require_count("--num_samples", self.num_samples)


GROUPS = (DatasetPromptArguments, ModelArguments, AdapterArguments, SamplingArguments)


def main(
    prompts: DatasetPromptArguments, model: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> None:
    """Generate `num_samples` texts from the data set's prompt."""
    from utils.generation.run import sample_instructions

    sample_instructions([PROMPTS[prompts.dataset_name]] * prompts.num_samples, model, adapter, sampling)


if __name__ == "__main__":
    with exit_on_invalid_argument(*GROUPS, flags=SAMPLING_FLAGS):
        main(*parse(*GROUPS, description=__doc__))
