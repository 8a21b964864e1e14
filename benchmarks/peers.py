"""The same work with other libraries, used as their documentation shows: PEFT, a plain loop, and Opacus.

They take a draw in batches of `batch` examples in random order, padded on the right with an attention mask, like a
DataLoader with a padding collator. These libraries are imported only when needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contenders import CLIP_NORM, NOISE_MULTIPLIER, Job, adamw
from benchmarks.lengths import IGNORE, Draw, padded
from benchmarks.models import TARGETS

PEFT, OPACUS_HOOKS, OPACUS_GHOST = "PEFT, no privacy", "Opacus hooks + PEFT", "Opacus ghost + PEFT"
# For a job without adapters:
PLAIN_LOOP, OPACUS_HOOKS_ALL, OPACUS_GHOST_ALL = "Hugging Face loop, no privacy", "Opacus hooks", "Opacus ghost"
OWN_LOSS = (PEFT, PLAIN_LOOP)
NEEDS: dict[str, tuple[str, ...]] = {
    PEFT: ("peft",),
    OPACUS_HOOKS: ("peft", "opacus"),
    OPACUS_GHOST: ("peft", "opacus"),
    OPACUS_HOOKS_ALL: ("opacus",),
    OPACUS_GHOST_ALL: ("opacus",),
    PLAIN_LOOP: (),
}


def missing(name: str) -> list[str]:
    """Missing packages of a contender; dptune's own contenders need none."""
    return [package for package in NEEDS.get(name, ()) if find_spec(package) is None]


def load_packages(name: str) -> None:
    """Import a contender's packages, so that they do not count as memory of its training."""
    if "peft" in NEEDS.get(name, ()):
        import peft  # noqa: F401
    if "opacus" in NEEDS.get(name, ()):
        import opacus  # noqa: F401


def make(name: str, job: Job) -> OwnLoss | Opacus:
    """The peer of that name."""
    if name in OWN_LOSS:
        return OwnLoss(job, name)
    return Opacus(job, name, ghost=name in (OPACUS_GHOST, OPACUS_GHOST_ALL))


def _trained_model(job: Job) -> Any:
    """The model with PEFT's adapters, or the whole model if the job has no adapters."""
    if job.rank is None:
        return job.own_model()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=job.rank, lora_alpha=job.rank, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(job.own_model(), config).train()


def _batches(draw: Draw, job: Job) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(draw), job.batch):
        yield padded(draw[start : start + job.batch], job.device)


class OwnLoss:
    """The usual training of PEFT's LoRA or of all parameters, with the model's own loss (the mean over tokens)."""

    def __init__(self, job: Job, name: str) -> None:
        self.name = name
        self._job = job
        self._model = _trained_model(job)
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
    """Opacus' per-sample gradients, by hooks or by ghost clipping (two backward passes), around PEFT or a whole model.

    For a whole GPT-2 the user must add three things: samplers for its linear layers, position ids for each example, and
    an untied output layer. Ghost clipping refuses a tied one, so both variants get an untied one.

    These are the objects that Opacus' PrivacyEngine makes. The loss is the batch mean of each example's mean loss: with
    `loss_reduction="mean"` Opacus multiplies by the batch size to recover each example's gradient.
    """

    def __init__(self, job: Job, name: str, *, ghost: bool) -> None:
        self.name = name
        self._job, self._ghost = job, ghost
        model = _trained_model(job)
        if job.rank is None:
            _register_conv1d()
            _untie(model)
        self._model, self._optimizer = (_ghost_parts if ghost else _hook_parts)(model, job)

    def step(self, draw: Draw) -> None:
        batches = list(_batches(draw, self._job))
        for number, (ids, labels, mask) in enumerate(batches, start=1):
            # As Opacus' BatchMemoryManager does: clip and add up now, update with the last batch.
            self._optimizer.signal_skip_step(do_skip=number < len(batches))
            more = {"position_ids": _positions(ids)} if self._job.rank is None else {}
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
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


def _positions(ids: Tensor) -> Tensor:
    """Position ids [B, T]. GPT-2 makes one row for the whole batch, whose gradient belongs to no example."""
    return torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)


def _untie(model: Any) -> None:
    """Give the output layer its own weight if it is tied to the embedding."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def _register_conv1d() -> None:
    """Register GPT-2's linear layer with Opacus: an ordinary one with a transposed weight, which has the same norm."""
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler
    from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
    from transformers.pytorch_utils import Conv1D

    def grad_sample(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        found = compute_linear_grad_sample(layer, activations, backprops)
        found[layer.weight] = found[layer.weight].transpose(1, 2)
        return found

    register_grad_sampler(Conv1D)(grad_sample)
    register_norm_sampler(Conv1D)(compute_linear_norm_sample)


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
    """The mean loss of each example over its labelled tokens, [B]."""
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    counts: Tensor = targets.ne(IGNORE).sum(1).clamp_min(1)
    return nll.sum(1) / counts
