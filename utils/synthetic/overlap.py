"""What a sample of texts shares with the rows that its generator was trained on.

Real texts that were not trained on also share words and phrases with the rows. So every number is compared with that of
held-out texts. A generator that memorises writes texts that are nearer to the rows than held-out texts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEARNESS_QUANTILES = (0.5, 0.95, 1.0)
_DIGITS = 5
_SIMILARITIES_AT_ONCE = 20_000_000  # 80 MB in float32


@dataclass(frozen=True)
class Nearness:
    """How near a sample's texts are to the training rows by one measure; a higher measure means nearer.

    Attributes:
        quantiles: of the measure over the sample, at NEARNESS_QUANTILES.
        nearer: probability that a text of the sample is nearer than a held-out text, counting ties half. It is 0.5
            without memorising, and 1 if every text is nearer (the area under the measure's ROC curve).
        nearer_error: its standard error.
    """

    quantiles: tuple[float, ...]
    nearer: float
    nearer_error: float


def normal_form(text: str) -> str:
    """The text without differences in case and white space; texts with equal forms are copies.

    >>> normal_form("Say  Hi\\n") == normal_form("say hi")
    True
    """
    return " ".join(text.casefold().split())


def copied_rows(texts: Sequence[str], rows: Sequence[str]) -> list[int]:
    """For each text the first row with the same `normal_form`, counted from 0; -1 if there is none."""
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(normal_form(row), number)
    return [first.get(normal_form(text), -1) for text in texts]


def nearest_similarity(texts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The cosine similarity of each text to its most similar row, float32 [N].

    Args:
        texts: embeddings, float [N, D], of length 1, or 0 for a text without a known word (its similarity is 0).
        rows: the same for the rows, float [M, D], M at least 1.

    Similarities are rounded, so that the similarity of a copy is exactly 1.
    """
    step = max(1, _SIMILARITIES_AT_ONCE // len(rows))
    parts = [(texts[start : start + step] @ rows.T).max(axis=1) for start in range(0, len(texts), step)]
    return np.concatenate(parts).round(_DIGITS).astype(np.float32)


def compare_nearness(sample: np.ndarray, held_out: np.ndarray) -> Nearness:
    """Compare a measure on a sample's texts, [N], with the measure on held-out texts, [M]; at least 2 texts each.

    The standard error is that of DeLong et al. (1988).
    """
    above = _share_below(sample, held_out)
    below = 1 - _share_below(held_out, sample)
    variance = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)
    return Nearness(
        tuple(np.quantile(sample, NEARNESS_QUANTILES).tolist()), float(above.mean()), float(np.sqrt(variance))
    )


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value the share of `others` below it, counting equal ones half."""
    ordered = np.sort(others)
    sides = [np.searchsorted(ordered, values, side=side) for side in ("left", "right")]
    return np.mean(sides, axis=0) / len(others)
