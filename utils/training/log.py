"""What is measured while a model trains: a file of diagnostics, a progress bar, and the final results.

None of it is private: losses, gradient norms, clipped fractions and batch sizes come straight from the data. So each
file begins with a notice that it must not be published. `dptune.report.statement` writes what may be published.
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

_SPEED_OVER_STEPS = 10  # the progress bar averages tokens/s, since draws differ in size

Track = Callable[[dict[str, Any], int], None]  # (values, step), such as `accelerator.log`


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What was measured in one step over all ranks. A field is None if it was not measured.

    Attributes:
        step: number of the step, from 1; 0 for measurements before the first step.
        loss: mean over the drawn examples, in nats per token (per example for classifiers).
        grad_norm_p10, grad_norm_p50, grad_norm_p90, grad_norm_max: norms of the drawn gradients before clipping.
        clipped_fraction: share of the drawn examples whose gradient was scaled down, 0 to 1.
        clip_norm: clip norm C of this step.
        batch_drawn: number of examples (or authors) drawn.
        tokens: tokens that the model processed, without padding.
        seconds: wall time of the step.
        learning_rate: learning rate of the update.
        epsilon: epsilon spent so far. The only value here that may be published.
        eval_loss: loss on held-out examples after the step, in nats per token (per example for classifiers).
        scores: a classifier's scores on held-out examples after the step, by split and then by metric.
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
        """The measured values, in order."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def summarise(losses: Tensor, norms: Tensor, clipped: Tensor, clip_norm: float | None) -> dict[str, Any]:
    """`StepMetrics` fields from per-example values of one step. An empty draw or a step without privacy gives fewer.

    Args:
        losses: one per example, [B], from all ranks and micro-batches.
        norms: gradient norms before clipping, [B], or [0] if none were computed.
        clipped: whether each gradient was scaled down, [B], or [0] without clipping.
        clip_norm: clip norm C of the step; None without clipping.
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
    """Writes each step to `diagnostics.jsonl`, shows it in a progress bar and passes it to a tracker.

    Use it as a context manager. On ranks other than the main one it does nothing.

    Args:
        output_dir: folder for `diagnostics.jsonl`; must exist.
        total_steps: where the progress bar ends.
        start_step: the last completed step of a resumed run. Lines up to it are kept; later ones, whose steps run
            again, are removed. 0 starts a new file.
        is_main: whether this process writes.
        track: called with (values, step), for example `accelerator.log`.
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
        """Log one step. Writes a value that is not finite as null, since strict JSON has no NaN."""
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
    """The rows of a `diagnostics.jsonl`, without its notice and without an incomplete line that a crash left."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # incomplete: its step was not finished, so a resumed run repeats it
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def write_all_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Write the final figures of a run as JSON, after a `notice` that they are not private.

    Args:
        path: the file, usually `all_results.json`.
        results: plain values, for example train_loss, eval_loss_before, eval_loss, perplexity, tokens_per_second,
            seconds, steps. A value that is not finite becomes null.
    """
    with atomic_write(path) as file:
        file.write(_dumps(_plain({"notice": NOTICE, **results}), indent=2) + "\n")


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` for strict JSON: numpy and torch scalars become Python numbers, non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
