"""Other libraries at the same work, each used as its documentation shows: PEFT without privacy, Opacus over PEFT.

They take a draw in plain batches of `batch` examples in random order, padded on the right with an attention mask, which
is what a DataLoader with a padding collator gives. The project needs none of these libraries, so they are imported
here only when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from benchmarks.contenders import CLIP_NORM, NOISE_MULTIPLIER, Job, adamw
from benchmarks.lengths import IGNORE, Draw, padded
from benchmarks.models import TARGETS, with_own_adapters

PEFT, OPACUS_HOOKS, OPACUS_GHOST = "PEFT, no privacy", "Opacus hooks + PEFT", "Opacus ghost + PEFT"
NEEDS = {PEFT: ("peft",), OPACUS_HOOKS: ("peft", "opacus"), OPACUS_GHOST: ("peft", "opacus")}


def missing(name: str) -> list[str]:
    """Packages that a contender needs and that are not installed; our own need none."""
    return [package for package in NEEDS.get(name, ()) if find_spec(package) is None]


def make(name: str, job: Job) -> Peft | Opacus:
    """The peer of that name."""
    return Peft(job) if name == PEFT else Opacus(job, ghost=name == OPACUS_GHOST)


def _peft_model(job: Job) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=job.rank, lora_alpha=job.rank, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(with_own_adapters(job.base, gradient_ckpt=job.gradient_ckpt), config).train()


def _batches(draw: Draw, job: Job) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(draw), job.batch):
        yield padded(draw[start : start + job.batch], job.device)


class Peft:
    """PEFT's LoRA and the model's own loss: the mean over the batch's labelled tokens, as most people train."""

    def __init__(self, job: Job) -> None:
        self.name = PEFT
        self._job = job
        self._model = _peft_model(job)
        self._optimizer = adamw([parameter for parameter in self._model.parameters() if parameter.requires_grad])

    def step(self, draw: Draw) -> None:
        batches = list(_batches(draw, self._job))
        for ids, labels, mask in batches:
            output = self._model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
            (output.loss / len(batches)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """Nothing to let go of."""


class Opacus:
    """Opacus' per-sample gradients, by hooks or by ghost clipping (two backward passes), around a PEFT model.

    These are the objects that its PrivacyEngine makes. The loss is the mean over the batch of each example's own mean:
    with `loss_reduction="mean"` Opacus multiplies by the batch size to get each example's gradient back.
    """

    def __init__(self, job: Job, *, ghost: bool) -> None:
        self.name = OPACUS_GHOST if ghost else OPACUS_HOOKS
        self._job, self._ghost = job, ghost
        self._model, self._optimizer = (_ghost_parts if ghost else _hook_parts)(_peft_model(job), job)

    def step(self, draw: Draw) -> None:
        batches = list(_batches(draw, self._job))
        for number, (ids, labels, mask) in enumerate(batches, start=1):
            # As Opacus' BatchMemoryManager does: clip and add up now, update with the last batch.
            self._optimizer.signal_skip_step(do_skip=number < len(batches))
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            self._backward(_own_means(logits, labels))
            self._optimizer.step()
            self._optimizer.zero_grad()

    def close(self) -> None:
        """Nothing to let go of."""

    def _backward(self, losses: Tensor) -> None:
        if not self._ghost:
            losses.mean().backward()
            return
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        DPTensorFastGradientClipping(self._model, self._optimizer, losses, "mean").backward()


def _hook_parts(model: Any, job: Job) -> tuple[Any, Any]:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    return GradSampleModule(model, loss_reduction="mean"), _dp_optimizer(DPOptimizer, model, job)


def _ghost_parts(model: Any, job: Job) -> tuple[Any, Any]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping

    module = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP_NORM, loss_reduction="mean")
    return module, _dp_optimizer(DPOptimizerFastGradientClipping, model, job)


def _dp_optimizer(kind: Any, model: Any, job: Job) -> Any:
    return kind(
        adamw([parameter for parameter in model.parameters() if parameter.requires_grad]),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=job.examples,
        loss_reduction="mean",
    )


def _own_means(logits: Tensor, labels: Tensor) -> Tensor:
    """Each example's mean over its own labelled tokens, [B]."""
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    counts: Tensor = targets.ne(IGNORE).sum(1).clamp_min(1)
    return nll.sum(1) / counts
