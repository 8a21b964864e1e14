"""What is measured while a model trains: a file of diagnostics, a progress bar, and the final results.

None of it is private. Losses, gradient norms, clipped fractions and batch sizes come straight from the data, so each
file begins by saying that it must not be published. What may be published is written by `dptune.report.statement`.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dptune._files import append_line, atomic_write
from dptune.accounting.rounding import rounded_up

DIAGNOSTICS_NAME = "diagnostics.jsonl"
NOTICE = (
    "NOT PRIVATE - do not publish: these values were measured on the training data and are not covered by the "
    "privacy guarantee"
)

_SPEED_OVER_STEPS = 10  # the progress bar's tokens/s is an average, for draws differ in size

Track = Callable[[dict[str, Any], int], None]  # (values, step), such as `accelerator.log`


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What was seen in one step over all ranks. None: not measured.

    Attributes:
        step: number of the step, from 1; 0 for what is measured before the first.
        loss: mean over the drawn examples, in nats a token (an example, for classifiers).
        grad_norm_p10, grad_norm_p50, grad_norm_p90, grad_norm_max: of the drawn examples' gradients before clipping.
        clipped_fraction: share of the drawn examples whose gradient was scaled down, 0 to 1.
        clip_norm: C of this step.
        batch_drawn: examples in the draw.
        tokens: tokens that went through the model, without padding.
        seconds: wall time of the step.
        learning_rate: of the update.
        epsilon: spent so far. The only private value here.
        eval_loss: on held-out examples, after the step, in nats a token (an example, for classifiers).
        scores: of a classifier on held-out examples, after the step, by split and then by metric.
    """

    step: int
    loss: float | None = None
    grad_norm_p10: float | None = None
    grad_norm_p50: float | None = None
    grad_norm_p90: float | None = None
    grad_norm_max: float | None = None
    clipped_fraction: float | None = None
    clip_norm: float | None = None
    batch_drawn: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    epsilon: float | None = None
    eval_loss: float | None = None
    scores: Mapping[str, Mapping[str, float]] | None = None

    def measured(self) -> dict[str, Any]:
        """The values that are there, in order."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def summarise(losses: Tensor, norms: Tensor, clipped: Tensor, clip_norm: float | None) -> dict[str, Any]:
    """`StepMetrics` fields from per-example values of one step; an empty draw or a plain step has fewer.

    Args:
        losses: one an example, [B], from all ranks and micro-batches.
        norms: gradient norms before clipping, [B], or [0] where none were taken.
        clipped: which gradients were scaled down, [B], or [0] where none were.
        clip_norm: C of the step; None without clipping.
    """
    summary: dict[str, Any] = {}
    if len(losses):
        summary["loss"] = losses.double().mean().item()
    if len(norms):
        at = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
        names = ("grad_norm_p10", "grad_norm_p50", "grad_norm_p90", "grad_norm_max")
        summary.update(zip(names, torch.quantile(norms.double().cpu(), at).tolist(), strict=True))
        summary["clipped_fraction"] = clipped.double().mean().item()
    return summary if clip_norm is None else summary | {"clip_norm": clip_norm}


class RunLog:
    """Writes each step to `diagnostics.jsonl`, shows it in a progress bar and hands it to a tracker.

    Use it as a context manager. On ranks other than the main one it does nothing.

    Args:
        output_dir: folder for `diagnostics.jsonl`; must exist.
        total_steps: where the progress bar ends.
        start_step: the step a resumed run continues after: lines up to it are kept, later ones were undone and go.
            0 begins a new file.
        is_main: whether this process writes.
        track: takes (values, step), for example `accelerator.log`.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        total_steps: int,
        *,
        start_step: int = 0,
        is_main: bool = True,
        track: Track | None = None,
    ) -> None:
        self.path = Path(output_dir) / DIAGNOSTICS_NAME
        self.rows: list[dict[str, Any]] = []
        self._is_main, self._track = is_main, track
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPEED_OVER_STEPS)
        if is_main:
            self._begin(start_step)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            disable=not is_main,
            desc="training",
            unit="step",
            dynamic_ncols=True,
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def record(self, metrics: StepMetrics) -> None:
        """Log one step. A value that is not finite is written as null: strict JSON has no NaN."""
        if not self._is_main:
            return
        values = metrics.measured()
        row = _plain(values)
        self.rows.append(row)
        append_line(self.path, _dumps(row))
        self._show(metrics)
        if self._track is not None:
            self._track({key: value for key, value in values.items() if key != "step"}, metrics.step)

    def _begin(self, start_step: int) -> None:
        if start_step and self.path.exists():
            self.rows = [row for row in read_diagnostics(self.path) if row["step"] <= start_step]
        with atomic_write(self.path) as file:
            file.writelines(_dumps(row) + "\n" for row in [{"notice": NOTICE}, *self.rows])

    def _show(self, metrics: StepMetrics) -> None:
        if metrics.tokens is not None and metrics.seconds is not None:
            self._recent.append((metrics.tokens, metrics.seconds))
        seconds = sum(seconds for _, seconds in self._recent)
        shown = {
            "epsilon": None if metrics.epsilon is None else rounded_up(metrics.epsilon, 3),
            "loss": None if metrics.loss is None else f"{metrics.loss:.3f}",
            "held_out": None if metrics.eval_loss is None else f"{metrics.eval_loss:.3f}",
            **{
                f"{split} {metric}": f"{score:.3f}"
                for split, found in (metrics.scores or {}).items()
                for metric, score in found.items()
            },
            "tokens/s": f"{sum(tokens for tokens, _ in self._recent) / seconds:,.0f}" if seconds else None,
        }
        self._bar.set_postfix({key: value for key, value in shown.items() if value is not None}, refresh=False)
        self._bar.update(max(0, metrics.step - self._bar.n))


def read_diagnostics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `diagnostics.jsonl`, without its notice and without a line that a crash tore off."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn: its step was not finished, a resumed run does it again
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def write_all_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Write the final figures of a run as JSON, with a `notice` first that they are not private.

    Args:
        path: the file, usually `all_results.json`.
        results: plain values, for example train_loss, eval_loss_before, eval_loss, perplexity, tokens_per_second,
            seconds, steps. One that is not finite becomes null.
    """
    with atomic_write(path) as file:
        file.write(_dumps(_plain({"notice": NOTICE, **results}), indent=2) + "\n")


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` as strict JSON takes it: scalars of numpy and torch unwrapped, what is not finite as None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
