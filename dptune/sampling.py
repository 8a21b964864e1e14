"""Poisson draws, and how a draw is distributed over ranks and micro-batches. No torch in this file.

The accounting holds only for Poisson sampling: at every step, each example enters the batch independently with
probability q. Shuffled epochs with the same q have a larger epsilon (Chua et al. 2024, "How private are DP-SGD
implementations?").
"""

from __future__ import annotations

import numpy as np

from dptune._validate import require_count, require_probability
from dptune.keystream import Keystream

SAMPLER = "Poisson"
METHOD_OF_EXAMPLES = "example-level sampling: every example is drawn and clipped by itself"


class PoissonSampler:
    """Draws sets of indices that contain each example independently with probability `sampling_probability`.

    Args:
        num_examples: size of the whole data set, including examples with a zero gradient.
        sampling_probability: q, in (0, 1].
        keystream: secret randomness, by default keyed from the operating system. Ranks that need the same draws share
            one key (`Keystream.shared`).

    Raises:
        InvalidArgument: a value outside its range.
    """

    def __init__(self, num_examples: int, sampling_probability: float, keystream: Keystream | None = None) -> None:
        require_count("num_examples", num_examples)
        require_probability("sampling_probability", sampling_probability)
        self.num_examples = num_examples
        self.sampling_probability = sampling_probability
        self.keystream = keystream or Keystream.from_os()

    def draw(self) -> np.ndarray:
        """The indices of one new draw, ascending, int64 [n]; possibly none."""
        return np.flatnonzero(self.keystream.uniforms(self.num_examples) < self.sampling_probability)


def deal(
    draw: np.ndarray, lengths: np.ndarray, *, token_budget: int, ranks: int = 1, max_padding: float = 0.05
) -> list[list[np.ndarray]]:
    """Cut one draw into micro-batches of similar lengths, with the same number of micro-batches on every rank.

    The draw is sorted by length and cut into rows of `ranks` examples, one for each rank. The longest example of a row
    goes to the rank with the fewest tokens so far, so all ranks get nearly the same number of tokens. A micro-batch is
    a sequence of rows. A new one starts when the padded rows would exceed `token_budget`, or when more than
    `max_padding` of them would be padding. This changes time and memory, but no result beyond rounding.

    Args:
        draw: indices of one Poisson draw, [n].
        lengths: tokens of every example of the data set, [num_examples].
        token_budget: maximum padded tokens on one rank at a time; a longer single example goes alone.
        ranks: number of processes that share the draw.
        max_padding: maximum share of padding in a micro-batch, in [0, 1]; with 1, padding is ignored.

    Returns:
        [rank][micro_batch] arrays of indices. An empty array stands for a dummy row: that rank has no example left, but
        must run as many forward passes as the others. An empty draw gives no micro-batches.

    Raises:
        InvalidArgument: `token_budget` or `ranks` is below 1.
    """
    require_count("token_budget", token_budget)
    require_count("ranks", ranks)
    descending = draw[np.argsort(-lengths[draw], kind="stable")]
    rows = [descending[start : start + ranks] for start in range(0, len(descending), ranks)]
    cuts = _cut([lengths[row] for row in rows], token_budget, ranks, max_padding)
    dealt: list[list[list[int]]] = [[[] for _ in cuts] for _ in range(ranks)]
    tokens = [0] * ranks
    for micro_batch, (start, stop) in enumerate(cuts):
        for row in rows[start:stop]:
            by_load = sorted(range(ranks), key=tokens.__getitem__)
            for rank, index in zip(by_load, row, strict=False):  # the last row may be shorter
                dealt[rank][micro_batch].append(int(index))
                tokens[rank] += int(lengths[index])
    return [[np.asarray(part, dtype=np.int64) for part in parts] for parts in dealt]


def _cut(row_lengths: list[np.ndarray], token_budget: int, ranks: int, max_padding: float) -> list[tuple[int, int]]:
    """(start, stop) of each run of rows, greedily. Lengths are descending: the first of a run is its padded width."""
    cuts: list[tuple[int, int]] = []
    start, tokens = 0, 0
    for number, row in enumerate(row_lengths):
        width = int(row_lengths[start][0])
        padded = width * (number - start + 1)
        filled = (tokens + int(row.sum())) / ranks
        if number > start and (padded > token_budget or filled < (1 - max_padding) * padded):
            cuts.append((start, number))
            start, tokens = number, 0
        tokens += int(row.sum())
    if row_lengths:
        cuts.append((start, len(row_lengths)))
    return cuts
