r"""Merge a trained adapter into its base model, for transformers, vLLM, lm-evaluation-harness and others.

    python -m scripts.merge OUT --output_dir merged

OUT is a run's folder, its folder publish, a lora_weights.bin or a PEFT folder. The folder `merged` holds the model as
safetensors, its tokenizer, and the adapter's privacy report, card and ledger: merging uses no data, so epsilon stays.
It appears when it is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.cli.flags import exit_on_invalid_argument, parse
from utils.files.folders import recorded_by_training, require_new_folder

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class MergeArguments:
    """What to merge, and where the model goes."""

    _argument_group_name = "merge"

    adapter: str = field(
        metadata={"help": "run folder, its publish, a lora_weights.bin or a PEFT folder", "positional": True}
    )
    output_dir: str = field(metadata={"help": "folder for the merged model; must not exist, or be empty"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "folder or hub name of the base model; default: the one that the adapter names"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a base model on the hub"})
    dtype: str | None = field(
        default=None, metadata={"help": "data type of the weights; default: the base model's", "choices": DTYPES}
    )

    def __post_init__(self) -> None:
        require_new_folder(self.output_dir)


GROUPS = (MergeArguments,)


@exit_on_invalid_argument(*GROUPS, flags=dict.fromkeys(("path", "lora_weights_path"), "ADAPTER"))
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check that all fits, and write the merged model."""
    (given,) = parse(*GROUPS, args=argv, description=__doc__)
    # Imported here, so that --help and a mistyped flag need neither torch nor transformers.
    from dptune.accounting.rounding import rounded_up
    from utils.models.merging import plan_merge, write_merged

    plan = plan_merge(given.adapter, base=given.model_name_or_path, revision=given.revision, dtype=given.dtype)
    print(f"base model             {plan.base} in {str(plan.dtype).removeprefix('torch.')}")
    bits = next((one for one in recorded_by_training(given.adapter, "qbits") if one in (4, 8)), None)
    if bits is not None:
        print(
            f"note: the adapter was trained on the base model in {bits} bits; it is merged into the unrounded weights"
        )
    statement = write_merged(plan, Path(given.output_dir))
    print(f"merged model           {given.output_dir}")
    if statement is None:
        print("privacy                unknown: there is no privacy report beside the adapter")
    elif statement.epsilon is None:
        print("privacy                NONE: " + "; ".join(statement.reasons))
    else:
        print(f"privacy                epsilon {rounded_up(statement.epsilon)} at delta {statement.delta:g}, as before")


if __name__ == "__main__":
    main()
