"""What a sample of texts has in common with the rows that its generator was trained on.

Real texts that were not trained on share words and phrases with the rows too. So every number stands beside that of
held-out texts: memorising shows as the synthetic ones being nearer to the rows than the held-out ones are.
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
    """How near to the training rows a sample's texts are, by one measure of it, higher meaning nearer.

    Attributes:
        quantiles: of the measure over the sample, at NEARNESS_QUANTILES.
        nearer: chance that one of the sample's texts is nearer than a held-out text, ties counting half: 0.5 without
            memorising, 1 if every text is (the area under the ROC curve of telling them apart by the measure).
        nearer_error: its standard error.
    """

    quantiles: tuple[float, ...]
    nearer: float
    nearer_error: float


def normal_form(text: str) -> str:
    """Texts with equal ones are copies of one another: case and white space are ignored.

    >>> normal_form("Say  Hi\\n") == normal_form("say hi")
    True
    """
    return " ".join(text.casefold().split())


def copied_rows(texts: Sequence[str], rows: Sequence[str]) -> list[int]:
    """For each text the first row that it is a copy of, by `normal_form`, counted from 0; -1 if there is none."""
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(normal_form(row), number)
    return [first.get(normal_form(text), -1) for text in texts]


def nearest_similarity(texts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The cosine similarity of each text to the row most like it, float32 [N].

    Args:
        texts: embeddings of length 1, or 0 for a text without any known word (its similarity is then 0), float [N, D].
        rows: the same of the rows, float [M, D], M at least 1.

    Rounded, so that texts equally near are so whatever rounding did: a copy's similarity is 1.
    """
    step = max(1, _SIMILARITIES_AT_ONCE // len(rows))
    parts = [(texts[start : start + step] @ rows.T).max(axis=1) for start in range(0, len(texts), step)]
    return np.concatenate(parts).round(_DIGITS).astype(np.float32)


def compare_nearness(sample: np.ndarray, held_out: np.ndarray) -> Nearness:
    """Compare what a measure says of a sample's texts, [N], with what it says of held-out ones, [M]; 2 each at least.

    The standard error is that of DeLong et al. (1988).
    """
    above = _share_below(sample, held_out)
    below = 1 - _share_below(held_out, sample)
    variance = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)
    return Nearness(
        tuple(np.quantile(sample, NEARNESS_QUANTILES).tolist()), float(above.mean()), float(np.sqrt(variance))
    )


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value the share of `others` below it, those equal to it counting half."""
    ordered = np.sort(others)
    sides = [np.searchsorted(ordered, values, side=side) for side in ("left", "right")]
    return np.mean(sides, axis=0) / len(others)
