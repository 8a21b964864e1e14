"""Dials: canaries for the audit by an adversary who sees every released gradient (Steinke et al. 2023, white box).

A dial is one trained number, which the model has for the audit alone. Each has a row without a token to learn. A secret
fair coin decides whether the row turns its dial: then its loss is the dial times a factor so large that its clipped
gradient is C along the dial, and 0 elsewhere. That is the worst case for privacy. No other row has a gradient there. So
the released gradient along a dial is N(C, (sigma C)^2) if its row was drawn and turns it, and else N(0, (sigma C)^2).
Noise bands correlate that noise over steps. The score of a dial is the exact log-likelihood ratio of all steps
together, see `dptune.audit.turn_ratios`.

Dials stay at 0, because no optimizer gets their gradient. So they change no loss and no other gradient.

Coins and scores stay in the run's folder. They are written after each step, so that a resumed run goes on with them.
Steps that a crash threw away were released too, and count. At most the score of a single step is lost.

Shapes: M dials, N rows, B rows of a micro-batch, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune.audit.training import AUDIT_FOLDER, DIALS_NAME, Canaries, write_canaries
from dptune.audit.turn_ratios import TurnRatios
from dptune.clipping_styles import Adaptive, Clipping, PerLayer
from dptune.mechanism import PrivacyConfig
from utils.data.encoding import SHORTEST
from utils.data.tokenization import NO_DIAL, TokenizedDataset
from utils.models.trainable import Losses
from utils.training.canaries import require_rows, resumed_canaries

FLAG = "--audit_dials"
DIAL_SCORE = "every released gradient"
_NAME = "audit_dials"  # of the layer in the model
_FACTOR = 2.0**20  # of a dial's loss, times C: clipping makes C of it, and float32 holds its square


def dials_of_run(count: int, folder: Path, *, resumed: bool) -> Canaries:
    """New coins, or those that a resumed run began with, with the scores so far. Main process only.

    Args:
        count: M.
        folder: the run's.
        resumed: whether the run is resumed.

    Raises:
        InvalidArgument: the resumed run began with another number, or their file is lost.
    """
    if resumed:
        return resumed_canaries(folder / AUDIT_FOLDER / DIALS_NAME, FLAG, count)
    random = np.random.default_rng()  # seeded by the operating system
    return Canaries(random.integers(0, 2, count).astype(bool), {})


def require_worst_case(count: int, clipping: Clipping) -> None:
    """Refuse clipping under which the gradient of a dial is not the worst case.

    Raises:
        InvalidArgument: the clip norm is split over layers, or follows the data.
    """
    if isinstance(clipping, PerLayer | Adaptive):
        refuse(FLAG, count, "dials need one clip norm for all layers and steps; give --clipping flat or automatic")


def with_dials(train: TokenizedDataset, dials: Canaries) -> TokenizedDataset:
    """The training set with a row for each dial behind its rows; only those whose coin says so turn it.

    Raises:
        InvalidArgument: rows are not the privacy unit, or are drawn with weights.
    """
    require_rows(train, FLAG, len(dials.included))
    count, size = len(dials.included), SHORTEST
    turned = np.where(dials.included, np.arange(count), NO_DIAL)
    return replace(
        train,
        ids=np.concatenate([train.ids, np.zeros(count * size, dtype=train.ids.dtype)]),
        is_answer=np.concatenate([train.is_answer, np.zeros(count * size, dtype=bool)]),
        starts=np.concatenate([train.starts, train.starts[-1] + size * np.arange(1, count + 1)]),
        dials=np.concatenate([np.full(len(train), NO_DIAL), turned]),
    )


def attach_dials(model: nn.Module, count: int, device: torch.device) -> nn.Embedding:
    """Give the model M more trained numbers, all 0. `detach_dials` takes them away."""
    dials = nn.Embedding.from_pretrained(torch.zeros(count, 1, device=device), freeze=False)
    model.add_module(_NAME, dials)
    return dials


def detach_dials(model: nn.Module) -> None:
    """Take the dials away from a model, if it has any."""
    if hasattr(model, _NAME):
        delattr(model, _NAME)


class DialLosses:
    """(input_ids [B, T], labels [B, T], dials [B, 1]) -> losses [B], to which each row's dial is added times a factor.

    Args:
        losses: those of the rows without dials.
        dials: the dials.
        clip_norm: C.
    """

    def __init__(self, losses: Losses, dials: nn.Embedding, clip_norm: float) -> None:
        self._losses, self._dials, self._factor = losses, dials, _FACTOR * clip_norm

    def __call__(self, input_ids: Tensor, labels: Tensor, dials: Tensor | None = None) -> Tensor:
        losses = self._losses(input_ids, labels)
        turned = input_ids.new_full((len(input_ids), 1), NO_DIAL) if dials is None else dials
        factors = turned.ne(NO_DIAL)[:, 0] * self._factor
        return losses + factors * self._dials(turned.clamp_min(0))[:, 0, 0]


class DialScores:
    """Adds each step's released gradient to the scores, and keeps it from the optimizer. See `Pace.after_release`.

    Args:
        folder: the run's.
        canaries: the coins, and the scores so far.
        dials: the model's dials.
        config: the mechanism.
        is_main: whether this process writes the scores.
    """

    def __init__(
        self, folder: Path, canaries: Canaries, dials: nn.Embedding, config: PrivacyConfig, *, is_main: bool
    ) -> None:
        self._path, self._canaries, self._dials = folder / AUDIT_FOLDER / DIALS_NAME, canaries, dials
        self._config, self._is_main = config, is_main
        count = len(canaries.included)
        self._before = canaries.scores.get(DIAL_SCORE, np.zeros(count))  # of earlier launches
        self._ratios = TurnRatios(
            config.bands,
            noise_multiplier=config.noise_multiplier,
            sampling_probability=config.sampling_probability,
            count=count,
        )

    def begin(self) -> None:
        """Keep the coins in the run's folder before its first step."""
        if self._is_main:
            write_canaries(self._path, self._canaries)

    def __call__(self) -> None:
        """Score the step that was just released."""
        released = self._dials.weight.grad
        if released is None:
            raise RuntimeError("the dials have no gradient: score each step before its update")
        self._dials.weight.grad = None  # optimizers leave such parameters alone
        if not self._is_main:
            return
        config = self._config
        seen = released[:, 0].double().cpu().numpy() * (config.divisor / config.clip_norm)
        self._canaries = replace(self._canaries, scores={DIAL_SCORE: self._before + self._ratios.add(seen)})
        write_canaries(self._path, self._canaries)
