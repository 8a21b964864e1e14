r"""Classify texts with a classifier that train_classifier.py trained, in any of its modes.

    python -m scripts.predict --model_path OUT/TASK --input_file texts.jsonl --text_columns text \
        --output_file predictions.jsonl

Each row of the output is the prediction for the row of the input with the same number: `label` (the class's number),
`class_name`, and `probabilities` by class name. The file appears when all rows are done. To use several processes,
launch it with torchrun or accelerate launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import refuse, require_count
from dptune._words import counted
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.files.folders import require_new_file


@dataclass
class PredictArguments:
    """The classifier, the texts, and where the predictions go."""

    _argument_group_name = "prediction"

    model_path: str = field(
        metadata={"help": "folder of a finished task of train_classifier.py (OUT/TASK), or its folder publish"}
    )
    input_file: str = field(
        metadata={"help": "file with the texts: JSON, JSONL, CSV, TSV or Parquet, or a saved data set"}
    )
    output_file: str = field(metadata={"help": "JSONL file for the predictions; an existing one is replaced"})
    text_columns: list[str] = field(
        metadata={"help": "column with the text, or the two columns of a pair in the order of the training"}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "the checkpoint that an adapter belongs to; default: the one that the adapter names"},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "maximum number of tokens per text; default: as in the training"}
    )
    batch_size: int = field(default=32, metadata={"help": "texts of --block_size tokens that go through at once"})

    def __post_init__(self) -> None:
        require_count("--batch_size", self.batch_size)
        if self.block_size is not None:
            require_count("--block_size", self.block_size, minimum=2)
        require_new_file(self.output_file, "--output_file", ".jsonl")
        output = Path(self.output_file)
        if output.exists() and Path(self.input_file).exists() and output.samefile(self.input_file):
            refuse("--output_file", self.output_file, "is the input file too; give another name")


GROUPS = (PredictArguments,)


@exit_on_invalid_argument(*GROUPS)
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load the classifier and write the predictions."""
    (given,) = parse(*GROUPS, args=argv, description=__doc__)
    # Imported here, so that --help and a mistyped flag need neither torch nor transformers.
    from utils.classification.labelled_texts import read_texts
    from utils.classification.prediction import load_trained_classifier, predictions
    from utils.cli.launch import make_accelerator
    from utils.files.jsonl import write_jsonl

    texts = read_texts(given.input_file, flag="--input_file", text_columns=given.text_columns)
    accelerator = make_accelerator()
    classifier = load_trained_classifier(
        given.model_path, base=given.model_name_or_path, max_length=given.block_size, device=accelerator.device
    )
    rows = list(predictions(classifier, texts, accelerator, batch_size=given.batch_size))
    if accelerator.is_main_process:
        write_jsonl(given.output_file, rows)
    accelerator.print(f"predictions            {given.output_file}: {counted(len(rows), 'row')}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
