"""The loop over tokens for a batch of prompts, which `generate` runs instead of its own (`custom_generate`).

It leaves out what `generate` computes in vain: a prompt that several rows share is read once and its cache copied, and
a text that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Exactly these layers of a cache: one that keeps more (a state space) inherits a selection that leaves the rest out.
_SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass
class _Batch:
    """The rows that are decoded: their numbers in the whole batch, their tokens so far, what else the model gets."""

    rows_B: Tensor
    ids_BT: Tensor
    inputs: dict[str, Any]

    def select(self, index_B: Tensor) -> None:
        """Keep or repeat rows."""
        size = len(self.rows_B)
        self.rows_B, self.ids_BT = self.rows_B[index_B], self.ids_BT[index_B]
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == size:
                self.inputs[name] = value[index_B]
            elif isinstance(value, Cache):
                value.batch_select_indices(index_B)


class Decoding:
    """A function for `generate`'s `custom_generate`.

    Args:
        choose: (scores [B, V], chances [B]) -> tokens [B].
        chances_BN: random numbers of each row and each of its N new tokens, in [0, 1).
        in_step: go on with empty passes until every rank is done, because they share weights.
    """

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor], chances_BN: Tensor, *, in_step: bool) -> None:
        self._choose, self._chances_BN, self._in_step = choose, chances_BN, in_step

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[..., Tensor],
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor:
        """Prompts and new tokens [B, T], with padding behind texts that ended."""
        new_BN = input_ids.new_full(self._chances_BN.shape, generation_config.pad_token_id)
        rows_B, can_select = torch.arange(len(input_ids), device=input_ids.device), _selectable(inputs)
        batch = _Batch(rows_B, input_ids, inputs)
        ended_B, count = torch.zeros_like(rows_B, dtype=torch.bool), 0
        scores_BV = _read_prompts(model, batch, shared=can_select)
        while True:
            if not ended_B.all():
                tokens_B = self._choose(
                    logits_processor(batch.ids_BT, scores_BV), self._chances_BN[batch.rows_B, count]
                )
                tokens_B = tokens_B.masked_fill(ended_B, generation_config.pad_token_id)
                new_BN[batch.rows_B, count] = tokens_B
                batch.ids_BT, count = torch.cat([batch.ids_BT, tokens_B[:, None]], dim=1), count + 1
                ended_B = ended_B | stopping_criteria(batch.ids_BT, None)
            all_ended = bool(ended_B.all())
            if not self._any_rank_goes_on(all_ended, input_ids.device):
                return torch.cat([input_ids, new_BN[:, :count]], dim=1)
            if can_select and not all_ended and ended_B.any():
                batch.select((~ended_B).nonzero().squeeze(1))
                ended_B = torch.zeros_like(batch.rows_B, dtype=torch.bool)
            scores_BV = _read(model, batch, next_sequence_length=1 if batch.inputs.get("use_cache") else None)

    def _any_rank_goes_on(self, ended: bool, device: torch.device) -> bool:
        """Whether this rank has work left, or another one that needs this rank's weights."""
        if not self._in_step:
            return not ended
        going = torch.tensor(float(not ended), device=device)
        distributed.all_reduce(going)
        return bool(going)


def _selectable(inputs: dict[str, Any]) -> bool:
    """Whether rows of the cache can be kept and repeated."""
    cache = inputs.get("past_key_values")
    if not isinstance(cache, Cache):
        return False
    kinds = [type(layer) for layer in cache.layers] or [cache.layer_class_to_replicate]
    return all(kind in _SELECTABLE for kind in kinds)


def _read_prompts(model: PreTrainedModel, batch: _Batch, *, shared: bool) -> Tensor:
    """The scores [B, V] of each row's first new token; where `shared`, equal prompts are read once."""
    places: dict[tuple[int, ...], int] = {}
    mask_BT = batch.inputs.get("attention_mask")
    whole = batch.ids_BT if mask_BT is None else torch.cat([batch.ids_BT, mask_BT.to(batch.ids_BT)], dim=1)
    keys = [tuple(row) for row in whole.tolist()]
    copies = [places.setdefault(key, len(places)) for key in keys]
    if not shared or len(places) == len(keys):
        return _read(model, batch, is_first_iteration=True)
    rows_B, ids_BT = batch.rows_B, batch.ids_BT
    batch.select(torch.tensor([keys.index(key) for key in places], device=ids_BT.device))
    scores = _read(model, batch, is_first_iteration=True)
    copies_B = torch.tensor(copies, device=ids_BT.device)
    batch.select(copies_B)
    batch.rows_B, batch.ids_BT = rows_B, ids_BT
    return scores[copies_B]


def _read(model: PreTrainedModel, batch: _Batch, **how: Any) -> Tensor:
    """One forward pass over the tokens that the cache does not have: scores of the next token, float32 [B, V]."""
    given = model.prepare_inputs_for_generation(batch.ids_BT, **how, **batch.inputs)
    outputs = model(**given, return_dict=True)
    batch.inputs = model._update_model_kwargs_for_generation(outputs, batch.inputs)
    # A copy, because logits processors write in place, and the logits of all the prompt's tokens may be behind it.
    return outputs.logits[:, -1].to(batch.ids_BT.device, torch.float32, copy=True)
