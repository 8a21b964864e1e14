"""A clip norm that is measured before training, without reading the data: `--clip_norm auto`.

The right clip norm C differs by a factor of 100 between models, and between adapters and whole models. So it is
measured on a few texts that the model itself writes: C is just above their typical gradient norm. Random tokens are
good enough for a classifier. For a language model they are unlike any text, and their gradients are far too large.

C depends on the model and on constants alone. The training rows, their number and `--seed` do not change it, so it
reveals nothing about the data.

All ranks make the same passes, also with sharded weights, and continue with the main process's C. Adapters start with
B = 0, and the gradient of A is zero until B has moved. So for adapters the gradient of B is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dptune._validate import refuse
from dptune.clipping import whole_norms
from dptune.per_example import PerExampleGradients
from dptune.per_example.fixed_values import in_mode
from dptune.sharding import compute_device
from utils.data.encoding import start_token
from utils.models.trainable import Losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS, _TOKENS = 16, 64
_SEED = 0  # not --seed, so that only the model decides


def clip_norm_of_own_texts(
    model: Any, losses: Losses, tokenizer: PreTrainedTokenizerBase, *, longest: int, loss_scale: float = 1.0
) -> float:
    """A clip norm just above the typical gradient norm of what the model itself writes.

    Args:
        model: a causal language model with its trained parameters; not changed. It may be sharded: then every rank
            calls this.
        losses: (input_ids, labels) -> one loss per row.
        tokenizer: the model's, for the tokens that begin and end a text.
        longest: maximum number of tokens per row in training, at least 2.
        loss_scale: of the training, see `PrivateStep`.

    Returns:
        The norm, see `just_above`.

    Raises:
        InvalidArgument: the gradients are zero or not finite.
    """
    rows = own_texts(model, tokenizer, tokens=min(_TOKENS, longest))
    return just_above(typical(gradient_norms(model, losses, rows, loss_scale=loss_scale)), given="auto")


@torch.no_grad()
def own_texts(model: Any, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> list[list[int]]:
    """Texts that the model writes without a prompt, sampled from all of its vocabulary, the same each time.

    Every pass reads the whole text so far, without a cache: that works for every model, sharded or not.

    Args:
        model: see `clip_norm_of_own_texts`.
        tokenizer: see there.
        tokens: T, of a text at most, with the one that begins it. A text may end earlier, with an end token.
    """
    device, start = compute_device(model), start_token(tokenizer)
    chances_BN = torch.rand(_ROWS, tokens - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    ids_BT = torch.full((_ROWS, 1), start, device=device)
    with in_mode(model, training=False):
        for chances_B in chances_BN.to(device).T:
            totals_BV = model(input_ids=ids_BT, use_cache=False).logits[:, -1].double().softmax(-1).cumsum(-1)
            wanted_B1 = chances_B[:, None] * totals_BV[:, -1:]
            chosen_B1 = torch.searchsorted(totals_BV, wanted_B1, right=True).clamp_(max=totals_BV.shape[1] - 1)
            ids_BT = torch.cat([ids_BT, chosen_B1], dim=1)
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return [_until_end(row, ends) for row in ids_BT.tolist()]


def _until_end(row: list[int], ends: Collection[int | None]) -> list[int]:
    """A text up to the first end token behind its first token."""
    return row[: next((at + 1 for at, token in enumerate(row) if at and token in ends), len(row))]


def gradient_norms(
    model: Any, losses: Losses, rows: Sequence[Sequence[int]], *, loss_scale: float = 1.0
) -> list[float]:
    """The norm of each row's gradient, as a private step measures it, without dropout. Nothing is released.

    It takes one row at a time, which needs far less memory than a step.
    """
    device, norms = compute_device(model), []
    with in_mode(model, training=False), PerExampleGradients(model) as recorder:
        for row in rows:
            ids = torch.tensor([row], device=device)
            loss: Tensor = losses(input_ids=ids, labels=ids).sum() * loss_scale
            loss.backward()
            norms.append(float(whole_norms(recorder.take().squared_norms())) / loss_scale)
    return norms


def typical(norms: Sequence[float]) -> float:
    """The median of gradient norms; NaN if one is not finite."""
    return median(norms) if all(map(math.isfinite, norms)) else math.nan


def just_above(norm: float, *, given: str | None) -> float:
    """A clip norm just above a typical gradient norm.

    With a far smaller one, every gradient is clipped to the same length, and the model learns mostly what all examples
    have in common. With a far larger one there is more noise, because the noise grows with the clip norm.

    Args:
        norm: the typical norm, above 0.
        given: what the user gave as --clip_norm, for the message.

    Returns:
        The norm, rounded up to two significant digits, so that rounding on another machine hardly ever changes it.

    Raises:
        InvalidArgument: the norm is zero or not finite.
    """
    if not (norm > 0 and math.isfinite(norm)):
        refuse("--clip_norm", given, f"cannot be measured: gradients at the start have norm {norm}; give a number")
    rounded = float(f"{norm:.1e}")
    if rounded < norm:
        rounded = float(f"{rounded + 10.0 ** (math.floor(math.log10(norm)) - 1):.1e}")
    return rounded
