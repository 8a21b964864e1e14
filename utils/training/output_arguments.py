"""Flags of training: where results go and what is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import require_count
from utils.cli.trackers import REPORT_TO_CHOICES, choose_trackers


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
        _ = self.trackers

    @property
    def trackers(self) -> list[str]:
        """The trackers that receive metrics."""
        return choose_trackers(self.report_to, with_tracking=self.with_tracking)
