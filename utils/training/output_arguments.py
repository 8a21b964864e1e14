"""Flags of training: where results go and what is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse, require_count
from utils.cli.trackers import REPORT_TO_CHOICES, choose_trackers
from utils.training.selection import HeldOutSelection


@dataclass
class OutputArguments:
    """Where results go and what is shown."""

    _argument_group_name = "output"

    output_dir: str = field(metadata={"help": "new folder for weights, privacy report and diagnostics"})
    checkpointing_steps: int = field(default=10, metadata={"help": "steps between checkpoints; 0 writes none"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep; older ones are deleted"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "checkpoint in --output_dir, or latest: the newest, or a new run if there is none"},
    )
    eval_freq: int = field(default=10, metadata={"help": "steps between measurements of the held-out loss"})
    eval_at_start: bool = field(default=True, metadata={"help": "measure the held-out loss before the first step too"})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "evaluations without a lower held-out loss after which training ends; default: never"},
    )
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "release the weights with the lowest held-out loss instead of the last"}
    )
    validation_is_public: bool = field(
        default=False,
        metadata={
            "help": "declares that the held-out rows are public, or of people who are not in the training data: what "
            "they decide is not private"
        },
    )
    sample_every: int | None = field(
        default=None, metadata={"help": "steps between texts that are sampled into samples.jsonl; default: none"}
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={
            "help": "file of prompts for --sample_every, as for inference_generation_instruction.py; default: an "
            "empty prompt, three times"
        },
    )
    with_tracking: bool = field(
        default=False, metadata={"help": "write TensorBoard files, which are not private, to --output_dir"}
    )
    report_to: str | None = field(
        default=None,
        metadata={"help": "tracker for the metrics (not private); all: all installed", "choices": REPORT_TO_CHOICES},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print epsilon, noise, steps and memory, then stop without training"}
    )

    def __post_init__(self) -> None:
        require_count("--eval_freq", self.eval_freq)
        require_count("--checkpointing_steps", self.checkpointing_steps, minimum=0)
        if self.save_total_limit is not None:
            require_count("--save_total_limit", self.save_total_limit)
        self._check_selection()
        if self.sample_every is not None:
            require_count("--sample_every", self.sample_every)
        elif self.sample_prompts is not None:
            refuse("--sample_prompts", self.sample_prompts, "is not read without --sample_every; give that too")
        _ = self.trackers

    def _check_selection(self) -> None:
        if self.early_stopping_patience is not None:
            require_count("--early_stopping_patience", self.early_stopping_patience)
        if self.validation_is_public and not self.selection.decides:
            remedy = "is read only with --early_stopping_patience or --load_best_model_at_end; leave it out"
            refuse("--validation_is_public", True, remedy)

    @property
    def selection(self) -> HeldOutSelection:
        """What the held-out rows decide."""
        return HeldOutSelection(self.early_stopping_patience, self.load_best_model_at_end)

    def require_selection(self, *, private: bool, has_validation: bool, sharded: bool = False) -> None:
        """Refuse that held-out rows decide something if they are missing, or in a private run not declared public.

        Args:
            private: whether the run is to have a guarantee.
            has_validation: whether there are held-out rows.
            sharded: whether the trained weights are spread over the ranks.
        """
        if not self.selection.decides:
            return
        patience = self.early_stopping_patience
        flag, value = (
            ("--load_best_model_at_end", True) if patience is None else ("--early_stopping_patience", patience)
        )
        if not has_validation:
            refuse(flag, value, "there are no held-out rows to decide it; give a validation split, or leave it out")
        if private and not self.validation_is_public:
            reason = "the result would depend on the held-out rows, which epsilon does not protect"
            remedy = "give --validation_is_public if they are public, or of people who are not in the training data"
            refuse(flag, value, f"{reason}; {remedy}")
        if self.load_best_model_at_end and sharded:
            refuse("--load_best_model_at_end", True, "is not built for sharded trained weights; leave it out")

    @property
    def trackers(self) -> list[str]:
        """The trackers that receive metrics."""
        return choose_trackers(self.report_to, with_tracking=self.with_tracking)
