"""Poisson draws, perhaps cut or cyclic, and how a draw is distributed over ranks and micro-batches. No torch here.

The accounting holds only for Poisson sampling: at every step, each example enters the batch independently with
probability q. A draw may be cut at a maximal batch, which costs more (`dptune/accounting/truncation.py`). Shuffled
epochs with the same q have a larger epsilon too (Chua et al. 2024, "How private are DP-SGD implementations?").

Correlated noise needs cyclic draws (`dptune/correlated_noise.py`): examples are in b groups, which take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dptune._validate import refuse, require_count, require_positive, require_probability
from dptune.bands import require_noise_bands
from dptune.keystream import BITS, Keystream, scratch_for

SAMPLER = "Poisson"
CUT_SAMPLER = "Poisson, cut"  # at a maximal batch
CYCLIC_SAMPLER = "Poisson, cyclic"  # in groups that take turns, for correlated noise
FIXED_KEY, NOT_SHOWN = "Poisson under a fixed key", "not shown"  # samplers of steps without a guarantee
_AT_ONCE = (
    1 << 16
)  # examples decided at a time: a draw takes this much memory and its own, whatever the data set's size
METHOD_OF_EXAMPLES = "example-level sampling: every example is drawn and clipped by itself"


@dataclass(frozen=True)
class Parts:
    """Parts of a data set, one after another, whose examples are drawn more or less often.

    The draws stay Poisson. Each example has its own probability, which is that of its part. Epsilon holds for every
    example if it is computed from the largest probability: a smaller one protects more.

    Attributes:
        sizes: number of examples of each part; treated as public, like their sum.
        weights: of each part, above 0. Twice the weight is twice the probability.

    Raises:
        InvalidArgument: no parts, not one weight for each, or a value outside its range.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.weights) != len(self.sizes):
            refuse("weights", self.weights, f"give one for each of the {len(self.sizes)} parts")
        for size in self.sizes:
            require_count("sizes", size)
        for weight in self.weights:
            require_positive("weights", weight)

    @property
    def shares(self) -> tuple[float, ...]:
        """For each part, its probability divided by the largest, in (0, 1]."""
        most = max(self.weights)
        return tuple(weight / most for weight in self.weights)

    @property
    def effective_size(self) -> float:
        """The number of examples of the largest weight that are drawn as often as all of these together."""
        return sum(size * share for size, share in zip(self.sizes, self.shares, strict=True))

    @property
    def identity(self) -> dict[str, object]:
        """Settings that a resumed run must share, as JSON values."""
        return {"parts": [list(part) for part in zip(self.sizes, self.shares, strict=True)]}

    @property
    def in_words(self) -> str:
        """The parts for plan and report."""
        return ", ".join(
            f"{size:,} with weight {weight:g}" for size, weight in zip(self.sizes, self.weights, strict=True)
        )

    def require_sum(self, num_examples: int) -> None:
        """Refuse parts of another number of examples."""
        if sum(self.sizes) != num_examples:
            refuse("parts", self.sizes, f"add up to {sum(self.sizes)}, but there are {num_examples} examples")


class PoissonSampler:
    """Draws sets of indices that contain each example independently with probability `sampling_probability`.

    Args:
        num_examples: size of the whole data set, including examples with a zero gradient.
        sampling_probability: q, in (0, 1].
        keystream: secret randomness, by default keyed from the operating system. Ranks that need the same draws share
            one key (`Keystream.shared`).
        parts: if given, q is the probability of the examples of the largest weight, and others have a share of it.
        max_batch: if given, a draw of more examples is cut: a uniformly random subset of so many stays.
        noise_bands: b. Above 1, each example is dealt into one of b groups, each with the same chance and independently
            of all others. The groups take turns: draw t holds examples of group t mod b alone, each with probability
            b q. The groups last as long as the sampler, which serves one `PrivateStep`.

    Raises:
        InvalidArgument: a value outside its range, or two of parts, `max_batch` and `noise_bands` above 1.
    """

    def __init__(
        self,
        num_examples: int,
        sampling_probability: float,
        keystream: Keystream | None = None,
        *,
        parts: Parts | None = None,
        max_batch: int | None = None,
        noise_bands: int = 1,
    ) -> None:
        require_count("num_examples", num_examples)
        require_probability("sampling_probability", sampling_probability)
        if parts is not None:
            parts.require_sum(num_examples)
        if max_batch is not None:
            require_count("max_batch", max_batch)
            require_no_parts(max_batch, parts)
        require_noise_bands(noise_bands, sampling_probability)
        require_plain_draws(noise_bands, parts, max_batch)
        self._max_batch, self._noise_bands = max_batch, noise_bands
        self._parts, self._num_examples, self._sampling_probability = parts, num_examples, sampling_probability
        self.keystream = keystream or Keystream.from_os()
        self._unused: deque[tuple[int, int]] = deque()  # (number, checksum) of the draws that no step has used
        self._turn = 0  # number of the next draw, without forgotten ones
        self._serves_a_step = False
        self._groups = self._dealt() if noise_bands > 1 else None

    @property
    def num_examples(self) -> int:
        """Size of the data set. It cannot change, because `PrivateStep` compares it with its configuration."""
        return self._num_examples

    @property
    def sampling_probability(self) -> float:
        """q; it cannot change either."""
        return self._sampling_probability

    @property
    def parts(self) -> Parts | None:
        """The parts, if examples have weights; they cannot change either."""
        return self._parts

    @property
    def max_batch(self) -> int | None:
        """The limit on the number of examples in a draw; it cannot change either."""
        return self._max_batch

    @property
    def noise_bands(self) -> int:
        """The number of groups that take turns; 1 if every draw is from all examples. It cannot change either."""
        return self._noise_bands

    @property
    def name(self) -> str:
        """How batches are drawn, in words for the ledger and the report."""
        if not self.keystream.secret:
            return FIXED_KEY
        if self.noise_bands > 1:
            return CYCLIC_SAMPLER
        return SAMPLER if self.max_batch is None else CUT_SAMPLER

    def draw(self) -> np.ndarray:
        """The indices of one new draw, ascending, int64 [n]; possibly none.

        Steps must use the draws in order. `PrivateStep` checks that what it was fed is the oldest unused draw.
        """
        scratch, found, kept = scratch_for(_AT_ONCE), [], []
        for start, count, probability in self._pieces():
            uniforms = self.keystream.integers(count, scratch=scratch) * 2.0**-BITS
            hits = self._of_group(np.flatnonzero(uniforms < probability), start)
            found.append(hits + start)
            kept.append(uniforms[hits])
        drawn = np.concatenate(found)
        if self.max_batch is not None and len(drawn) > self.max_batch:
            drawn = _cut_at(self.max_batch, drawn, np.concatenate(kept))
        self._unused.append((len(drawn), checksum_of_items(drawn)))
        self._turn += 1
        return drawn

    def _pieces(self) -> Iterator[tuple[int, int, float]]:
        """(first example, number of examples, their probability) of all neighbours that are decided at once."""
        sizes, shares = ((self.num_examples,), (1.0,)) if self.parts is None else (self.parts.sizes, self.parts.shares)
        end = 0
        for size, share in zip(sizes, shares, strict=True):
            begin, end = end, end + size
            for start in range(begin, end, _AT_ONCE):
                yield start, min(_AT_ONCE, end - start), self.noise_bands * self.sampling_probability * share

    def _dealt(self) -> np.ndarray:
        """The group of every example, uint8 [num_examples]. It depends on the key and the example's number alone."""
        groups = np.empty(self.num_examples, dtype=np.uint8)
        for start in range(0, self.num_examples, _AT_ONCE):
            part = groups[start : start + _AT_ONCE]
            part[:] = self.keystream.integers(len(part)) % self.noise_bands
        return groups

    def _of_group(self, hits: np.ndarray, start: int) -> np.ndarray:
        """Those of the hits, counted from example `start`, whose turn it is."""
        if self._groups is None:
            return hits
        own: np.ndarray = hits[self._groups[start + hits] == self._turn % self.noise_bands]
        return own

    def _begin(self) -> None:
        """Serve a step. With noise bands it must be the first: its noise begins where the turns begin.

        Raises:
            RuntimeError: the sampler has served another step, or was drawn from before.
        """
        if self.noise_bands > 1 and (self._serves_a_step or self._turn):
            raise RuntimeError("with noise bands each PrivateStep needs a new sampler, before its first draw")
        self._serves_a_step = True

    def _use(self, number: int, checksum: int) -> None:
        """Mark the oldest unused draw as used by a step that was fed so many items with this checksum.

        Only steps call it. A loop that could would skip draws that it does not like.

        Raises:
            RuntimeError: the step was fed something else, or there is no unused draw.
        """
        if not self._unused:
            raise RuntimeError("this step has no draw: call the sampler's draw() once per step")
        drawn, wanted = self._unused[0]
        if (number, checksum) != (drawn, wanted):
            raise RuntimeError(
                f"the draw holds {drawn} examples, but the step was fed {number} or others; none is used"
            )
        self._unused.popleft()

    def _forget(self) -> None:
        """Drop the unused draws, for a loader that drew ahead and begins anew.

        A loop must not call it. If draws are dropped for what they hold, the rest are no Poisson draws. Loaders drop
        draws at the end of an epoch or of a launch, whatever the draws hold. The next draw takes the turn of the first
        one that is dropped.
        """
        self._turn -= len(self._unused)
        self._unused.clear()


def _cut_at(most: int, drawn: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """`most` of the examples, in order.

    Those with the smallest uniforms stay. Given that they are drawn, the uniforms are still independent and all alike.
    So all subsets are equally likely, and one more example can push out only one.
    """
    return np.sort(drawn[np.argsort(uniforms, kind="stable")[:most]])


def require_no_parts(max_batch: int | None, parts: Parts | None) -> None:
    """Refuse cut draws from parts with weights, whose cost is not known."""
    if max_batch is not None and parts is not None:
        refuse("max_batch", max_batch, "draws with weights cannot be cut; leave it or the weights out")


def require_plain_draws(noise_bands: int, parts: Parts | None, max_batch: int | None) -> None:
    """Refuse noise bands with weights or cut draws, whose cost together is not known."""
    if noise_bands > 1 and parts is not None:
        refuse("noise_bands", noise_bands, "draws with weights cannot take turns; leave it or the weights out")
    if noise_bands > 1 and max_batch is not None:
        refuse("noise_bands", noise_bands, "draws that are cut cannot take turns; leave it or max_batch out")


def checksum_of_items(items: np.ndarray) -> int:
    """A 64-bit checksum of a set of item numbers, as a signed integer; the checksums of its parts add up to it.

    Other sets almost never have the same one (SplitMix64's last rounds, see `dptune.ranks`).
    """
    mixed = items.astype(np.uint64) + np.uint64(1)
    for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(odd)
    return int((mixed ^ (mixed >> np.uint64(31))).sum(dtype=np.uint64).astype(np.int64))


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
        token_budget: maximum padded tokens on one rank at a time; an example with more has a micro-batch of its own.
        ranks: number of processes that share the draw.
        max_padding: maximum share of padding in a micro-batch, in [0, 1]; with 1, padding is ignored.

    Returns:
        For each rank a list of micro-batches, each an array of indices. An empty array is a dummy row: that rank has
        no example left, but must run as many forward passes as the others. An empty draw gives no micro-batches.

    Raises:
        InvalidArgument: `token_budget` or `ranks` is below 1.
    """
    require_count("token_budget", token_budget)
    require_count("ranks", ranks)
    descending = draw[np.argsort(-lengths[draw], kind="stable")].astype(np.int64, copy=False)
    tokens = lengths[descending]
    row_tokens = np.add.reduceat(tokens, np.arange(0, len(tokens), ranks)) if len(tokens) and ranks > 1 else tokens
    cuts = _cut(tokens[::ranks], row_tokens, token_budget, ranks, max_padding)
    parts = [slice(start * ranks, stop * ranks) for start, stop in cuts]
    owners = _owners(tokens, ranks)
    return [[descending[part][owners[part] == rank] for part in parts] for rank in range(ranks)]


def _owners(tokens: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each example, int32 [n]: of `ranks` neighbours, the longest goes where the fewest tokens are."""
    owners, load = np.zeros(len(tokens), dtype=np.int32), [0] * ranks
    for start in range(0, len(tokens) if ranks > 1 else 0, ranks):
        by_load = sorted(range(ranks), key=load.__getitem__)
        row = tokens[start : start + ranks].tolist()  # the last row may be shorter
        owners[start : start + ranks] = by_load[: len(row)]
        for rank, size in zip(by_load, row, strict=False):
            load[rank] += size
    return owners


def _cut(
    widths: np.ndarray, row_tokens: np.ndarray, token_budget: int, ranks: int, max_padding: float
) -> list[tuple[int, int]]:
    """(start, stop) of each run of rows, greedily. Lengths are descending: the first of a run is its padded width.

    Args:
        widths: the longest example of each row of `ranks` examples.
        row_tokens: tokens of all of them.
        token_budget, ranks, max_padding: see `deal`.
    """
    cuts: list[tuple[int, int]] = []
    start, tokens = 0, 0
    for number, own in enumerate(map(int, row_tokens)):
        padded = int(widths[start]) * (number - start + 1)
        filled = (tokens + own) / ranks
        if number > start and (padded > token_budget or filled < (1 - max_padding) * padded):
            cuts.append((start, number))
            start, tokens = number, 0
        tokens += own
    if len(row_tokens):
        cuts.append((start, len(row_tokens)))
    return cuts
