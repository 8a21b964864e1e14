"""A run of train_clm.py that is planned but has not started, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dptune.audit.training import Canaries
from dptune.report.prior import PriorRelease
from dptune.run.plan import RunPlan
from utils.cli.launch import loss_scale
from utils.data.tokenization import TokenizedDataset
from utils.training.arguments import Groups
from utils.training.run import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalLMJob:
    """A run of train_clm.py that is planned but has not started.

    Attributes:
        groups: the flags.
        folder: where it runs.
        dtype: what forward passes compute in.
        names: names of all parameters that will be trained.
        tokenizer, train, held_out: the tokenizer and the data.
        plan: sampling, noise and steps.
        config: the settings to record, with the history of their changes.
        identity: what a resumed run must share, as far as it is known before the model is loaded.
        token_budget: padded tokens in one forward pass.
        asked: the token budget that the flags ask for.
        starts_from: the release that the adapters start from, and those before it.
        canaries, dials: rows for an audit, which `train` holds; None without.
    """

    groups: Groups
    folder: RunFolder
    dtype: torch.dtype
    names: list[str]
    tokenizer: PreTrainedTokenizerBase
    train: TokenizedDataset
    held_out: TokenizedDataset | None
    plan: RunPlan
    config: dict[str, Any]
    identity: dict[str, Any]
    token_budget: int
    asked: int
    starts_from: tuple[PriorRelease, ...] = ()
    canaries: Canaries | None = None
    dials: Canaries | None = None

    @property
    def whole(self) -> bool:
        """Whether the model's own parameters are trained, and no adapters."""
        return bool(self.groups.lora.trainable)

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by, so that gradients do not vanish in `dtype`."""
        return loss_scale(self.dtype, whole=self.whole)


def with_clip_norm(groups: Groups, clip_norm: float) -> Groups:
    """The flags with a clip norm that was open before."""
    return groups._replace(privacy=replace(groups.privacy, clip_norm=clip_norm))
