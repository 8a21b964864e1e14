r"""Sample texts from the prompt of a data set: synthetic data with the look of what the adapter was trained on.

Launch:

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg inference_generation_dataset.py \
        --dataset_name pubmed_generation --model_name_or_path PATH --lora_weights_path OUT/lora_weights.bin \
        --num_samples 100 --max_length 512 --output_dir generations

Writes `generations.jsonl` to --output_dir: a line a text with prompt, text, index, and ended (the model closed it
itself, or wrote a --stop string; otherwise it was cut at --max_length). Run the same line again to continue after an
interruption. Beside it: `summary.json`, with counts, and with --deduplicate `instructions.jsonl`. No data are read.
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
    """Which prompt, how often."""

    _argument_group_name = "prompts"

    dataset_name: str = field(metadata={"help": "data set whose prompt is sampled from", "choices": tuple(PROMPTS)})
    num_samples: int = field(default=100, metadata={"help": "texts to draw"})

    def __post_init__(self) -> None:
        require_count("--num_samples", self.num_samples)


GROUPS = (DatasetPromptArguments, ModelArguments, AdapterArguments, SamplingArguments)


def main(
    prompts: DatasetPromptArguments, model: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> None:
    """Draw `num_samples` texts from the data set's prompt."""
    from utils.generation.run import sample_instructions

    sample_instructions([PROMPTS[prompts.dataset_name]] * prompts.num_samples, model, adapter, sampling)


if __name__ == "__main__":
    with exit_on_invalid_argument(*GROUPS, flags=SAMPLING_FLAGS):
        main(*parse(*GROUPS, description=__doc__))
