"""Texts that are sampled from a model while it trains, for `--sample_every`.

A text comes from the released weights, prompts that the user wrote and random numbers of its own, so it costs nothing
beyond the epsilon of the steps before it. Training must draw the same numbers with and without it: no global generator
is used. Prompts are never taken from the training data, which would not be private.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from dptune._files import append_line, atomic_write
from dptune._validate import refuse, renamed
from utils.data.instruction_files import read_instructions
from utils.data.prompts import UNCONDITIONAL
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import sampling_config
from utils.generation.batches import TextJob, make_jobs
from utils.generation.hf import draw_batch
from utils.generation.run import make_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES_NAME = "samples.jsonl"
NEW_TOKENS = 64
_EMPTY = ("", "", "")  # the default: three texts without a prompt
PRIVATE_NOTICE = "sampled from the weights after private steps: covered by the epsilon of the whole run"
OPEN_NOTICE = "NOT PRIVATE - do not publish: sampled from a model that was trained without privacy"


def read_prompts(path: str | None, style: str) -> list[str]:
    """The instructions of --sample_prompts, or empty ones.

    Raises:
        InvalidArgument: the file cannot be read, or the prompt style takes no instruction.
    """
    if path is None:
        return list(_EMPTY)
    if style == UNCONDITIONAL:
        refuse("--sample_prompts", path, f"--prompt_style {style} takes no prompt; leave it out")
    with renamed({"--instruction_file": "--sample_prompts"}):
        return read_instructions(path).texts


class TrainingSamples:
    """Samples one text for each prompt every few steps, on the main process, and appends them to `samples.jsonl`.

    Args:
        every: steps between samples.
        prompts: instructions, as `read_prompts` gives them.
        style: the prompt style of the training.
        tokenizer: the model's.
        folder: the run's folder.
        max_length: tokens of a prompt and its text together.
        private: whether the run has noise.
        start: completed steps of a resumed run; texts of later steps are removed.
        is_main: whether this process samples.

    Raises:
        InvalidArgument: a prompt is too long, or the chat template fails.
    """

    def __init__(
        self,
        every: int,
        prompts: Sequence[str],
        *,
        style: str,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        max_length: int,
        private: bool,
        start: int = 0,
        is_main: bool = True,
    ) -> None:
        self._every, self._tokenizer, self._is_main, self._start = every, tokenizer, is_main, start
        self._path, self._notice = folder / SAMPLES_NAME, PRIVATE_NOTICE if private else OPEN_NOTICE
        with renamed({"--max_length": "--block_size"}):
            self._jobs = make_jobs(tokenizer, make_prompts(prompts, style, tokenizer), max_length)
        self._max_length, self._begun = max_length, False

    def __call__(self, model: Any, step: int, epsilon: float | None) -> None:
        """Sample, if it is time to; see `utils.training.loop.Pace`."""
        if step % self._every or not self._is_main:
            return
        if not self._begun:
            self._begin()
        for job, text in zip(self._jobs, self._texts(model, step), strict=True):
            row = {"step": step, "epsilon": epsilon, "prompt": job.prompt, "text": text}
            append_line(self._path, json.dumps(row, ensure_ascii=False, allow_nan=False))

    def _begin(self) -> None:
        """Start the file, with the rows of the steps before a resumed run's."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._start and self._path.exists() else []
        rows = [row for row in map(_row, lines) if row is not None and row["step"] <= self._start]
        with atomic_write(self._path) as file:
            for row in [{"notice": self._notice}, *rows]:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._begun = True

    @torch.no_grad()
    def _texts(self, model: Any, step: int) -> list[str]:
        """One text per job. The model's mode and its own settings of generation are afterwards as before."""
        was_training, own = model.training, model.generation_config
        model.eval()
        try:
            config = sampling_config(model, self._tokenizer, SamplingArguments(output_dir=""))
            model.generation_config = GenerationConfig()  # so that the model's defaults are not used
            return [self._drawn(model, job, config, seed=step) for job in self._jobs]
        finally:
            model.generation_config = own
            model.train(was_training)

    def _drawn(self, model: Any, job: TextJob, config: GenerationConfig, *, seed: int) -> str:
        longest = min(self._max_length, len(job.ids) + NEW_TOKENS)
        number = seed * len(self._jobs) + job.index  # the same prompt twice gives two texts
        drawn = draw_batch(model, self._tokenizer, [job.ids], config, max_length=longest, seed=number)
        return drawn[0].text


def _row(line: str) -> dict[str, Any] | None:
    """The row in a line; None for the notice, and for an incomplete line that a crash left."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
