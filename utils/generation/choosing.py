"""How the next token is drawn from a model's scores, with random numbers that are given.

Each text of a batch has a number from [0, 1) for each token. So its tokens do not depend on which other texts of the
batch have ended. Only the k likeliest tokens are sorted, not the whole vocabulary, as transformers' top_p does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig


@dataclass(frozen=True)
class TokenChoice:
    """Temperature, then the `top_k` likeliest tokens, then the likeliest of them with total probability `top_p`.

    Attributes:
        temperature: 0 chooses the likeliest token.
        top_k: 0 is off.
        top_p: 1 is off.
    """

    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, config: GenerationConfig) -> TokenChoice:
        """The settings of `config`, where what is not set is off."""
        if not config.do_sample:
            return cls(0.0, 0, 1.0)
        temperature, top_p = (1.0 if value is None else value for value in (config.temperature, config.top_p))
        return cls(temperature, config.top_k or 0, top_p)

    def __call__(self, scores_BV: Tensor, chances_B: Tensor) -> Tensor:
        """The chosen tokens, int64 [B].

        Args:
            scores_BV: logits, float [B, V].
            chances_B: a random number of each row, float64 [B] in [0, 1).
        """
        if self.temperature == 0:
            return scores_BV.argmax(dim=-1)
        scores_BK, tokens_BK = self._candidates(scores_BV / self.temperature)
        probabilities_BK = scores_BK.double().softmax(dim=-1)
        totals_BK = probabilities_BK.cumsum(dim=-1)
        if self.top_p < 1:
            # A token stays if those that are likelier do not reach top_p; the first one always does.
            kept_BK = (totals_BK - probabilities_BK < self.top_p).index_fill(1, tokens_BK.new_zeros(1), value=True)
            totals_BK = probabilities_BK.mul_(kept_BK).cumsum(dim=-1)
        wanted_B1 = chances_B[:, None] * totals_BK[:, -1:]
        places_B1 = torch.searchsorted(totals_BK, wanted_B1, right=True).clamp_(max=totals_BK.shape[1] - 1)
        return tokens_BK.gather(1, places_B1).squeeze(1)

    def _candidates(self, scores_BV: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, tokens) [B, K] that `top_k` leaves, the likeliest first where `top_p` needs that."""
        vocabulary = scores_BV.shape[-1]
        if 0 < self.top_k < vocabulary:
            best = scores_BV.topk(self.top_k, dim=-1)
            return best.values, best.indices
        if self.top_p < 1:
            sorted_ = scores_BV.sort(dim=-1, descending=True, stable=True)
            return sorted_.values, sorted_.indices
        return scores_BV, torch.arange(vocabulary, device=scores_BV.device).expand_as(scores_BV)


def chances(seed: int, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Random numbers in [0, 1), float64 [rows, tokens], which depend on `seed` and the shape alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, tokens, dtype=torch.float64, generator=generator).to(device)
