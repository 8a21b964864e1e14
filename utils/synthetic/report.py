"""The sections of the page on how synthetic text compares with real text: tables, explanations, plots.

They hold numbers and sample names, and quote no text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from utils.synthetic.arguments import HELD_OUT, REFERENCE
from utils.synthetic.divergence import Divergence
from utils.synthetic.evaluation import Lengths, Overlap, Words
from utils.synthetic.overlap import Nearness
from utils.synthetic.page import Plot, Section, TableRow
from utils.synthetic.plots import plot_accuracies, plot_curves, plot_lengths, plot_ranks, plot_tails

_T = TypeVar("_T")


def divergence_section(results: Mapping[str, Divergence], texts: int) -> Section:
    """MAUVE and related divergences."""
    some = next(iter(results.values()))
    rows = [
        _row("MAUVE", results, lambda one: _with_error(one.mauve, one.mauve_error)),
        _row("MAUVE, smoothed", results, lambda one: _number(one.mauve_star)),
        _row("frontier integral", results, lambda one: _number(one.frontier_integral)),
        _row("real text missed", results, lambda one: _percent(one.missed)),
        _row("text unlike any real text", results, lambda one: _percent(one.spurious)),
    ]
    explanation = (
        f"{texts} texts of each sample are embedded and grouped into {some.clusters} clusters. MAUVE compares how the "
        "sample and real text spread over the clusters: 1 means equally, 0 nothing in common, ± is a standard error. "
        f"Compare with the column “{HELD_OUT}”: this is what other real text scores. For the frontier integral 0 is "
        "best. The last two rows are the shares of real and of synthetic texts in clusters without the other kind."
    )
    plot = Plot(
        plot_curves({name: one.curve for name, one in results.items()}),
        "Divergence curves: MAUVE is the area below. A curve that is low at the right misses kinds of real text. A "
        "curve that ends early at the top has kinds of text that real text lacks.",
    )
    return Section("Overall similarity", explanation, list(results), rows, [plot])


def words_section(words: Words) -> Section:
    """Vocabulary."""
    results = words.columns
    rows = [
        _row("different words", results, lambda one: f"{one.size:,}"),
        _row("words not in real text", results, lambda one: _percent(one.unseen)),
        _row("real words missing", results, lambda one: _percent(one.missed)),
        _row("distinct-1", results, lambda one: _number(one.distinct[0])),
        _row("distinct-2", results, lambda one: _number(one.distinct[1])),
        _row("distinct-3", results, lambda one: _number(one.distinct[2])),
        _row("difference of word frequencies (bits)", results, lambda one: _number(one.frequency_divergence)),
    ]
    explanation = (
        f"Each sample is cut to {words.words:,} words, because a longer sample has more different words. A model that "
        "repeats itself has few different words and a low distinct-2 (the share of different pairs of words). A model "
        "that writes nonsense has many words that are not in real text. The last row is the Jensen-Shannon divergence "
        "of the word frequencies: 0 means equal, 1 means nothing in common. The column "
        f"“{HELD_OUT}” shows how much two real samples differ by chance."
    )
    plot = Plot(plot_ranks(words.curves), "Word frequencies by rank. Real text gives nearly a straight line.")
    return Section("Words", explanation, list(results), rows, [plot])


def lengths_section(lengths: Lengths, unit: str) -> Section:
    """Lengths in one unit."""
    results = {**lengths.columns, REFERENCE: lengths.reference}
    labels = ["5% quantile", "25% quantile", "median", "75% quantile", "95% quantile"]
    rows = [_row("mean", results, lambda one: f"{one.mean:,.1f}")]
    for label, values in zip(labels, zip(*(one.quantiles for one in results.values()), strict=True), strict=True):
        rows.append((label, [f"{value:,.0f}" for value in values]))
    rows.append(_row(f"distance ({unit})", results, lambda one: f"{one.wasserstein:,.1f}"))
    rows.append(_row("Kolmogorov-Smirnov statistic", results, lambda one: _number(one.ks)))
    rows.append(_row("its p-value", results, lambda one: f"{one.ks_p:.2g}"))
    explanation = (
        "Lengths are compared with the reference, the other half of the held-out texts. The (Wasserstein) distance is "
        "how much lengths must change on average to match it. A p-value near 0 means that the difference is not chance."
    )
    plot = Plot(plot_lengths(lengths.values, f"{unit} (logarithmic)"), "Share of texts by length.")
    return Section(f"Length in {unit}", explanation, list(results), rows, [plot])


def proxy_section(results: Mapping[str, Mapping[str, float]], description: str) -> Section:
    """Train on synthetic, test on real."""
    rows = [
        _row("accuracy", results, lambda one: _with_error(one["accuracy"], one["accuracy_error"], digits=4)),
        _row("nats per token", results, lambda one: _number(one["nats_per_token"])),
        _row("bits per byte", results, lambda one: _number(one["bits_per_byte"])),
    ]
    explanation = (
        f"{description} It is then tested on all held-out real texts. Accuracy is the share of next tokens that it "
        "predicts correctly, ± a standard error over texts. Good synthetic text teaches nearly as much as real rows. "
        "Nats and bits measure the cross-entropy: less is better."
    )
    plot = Plot(plot_accuracies(results), "Next-token accuracy on held-out real text, with two standard errors.")
    return Section("Train on synthetic, test on real", explanation, list(results), rows, [plot])


def overlap_section(results: Mapping[str, Overlap], passage_words: int, file_name: str) -> Section:
    """What the samples share with the training rows."""
    rows = [
        _row("copies of a training row", results, lambda one: f"{one.copies} ({_percent(one.copies / one.texts)})"),
        _row(
            f"copies, or {passage_words} or more shared words",
            results,
            lambda one: f"{one.passages} ({_percent(one.passages / one.texts)})",
        ),
        *_nearness_rows("longest passage (words)", results, lambda one: one.passage, lambda value: f"{value:,.0f}"),
        *_nearness_rows("most similar row (cosine)", results, lambda one: one.similarity, _number),
    ]
    explanation = (
        "A generator that memorises writes texts that are nearer to the training rows than real held-out texts are "
        f"(column “{HELD_OUT}”). “Nearer than held out” is 0.5 without memorising and above 0.5 with it, ± a standard "
        "error. Short texts share short passages, so compare samples of similar length. The passages are in "
        f"{file_name}: protect it like the training rows, and do not publish it."
    )
    plots = [
        Plot(
            plot_tails({name: one.lengths for name, one in results.items()}, "words (logarithmic)", logarithmic=True),
            "Share of texts by the length of the longest passage that they share with a training row.",
        ),
        Plot(
            plot_tails({n: one.similarities for n, one in results.items()}, "cosine similarity", logarithmic=False),
            "Share of texts by their similarity to the most similar training row.",
        ),
    ]
    return Section("Overlap with the training rows", explanation, list(results), rows, plots)


def _nearness_rows(
    label: str, results: Mapping[str, Overlap], of: Callable[[Overlap], Nearness], show: Callable[[float], str]
) -> list[TableRow]:
    found = {name: of(one) for name, one in results.items()}
    return [
        _row(f"{label}: median", found, lambda one: show(one.quantiles[0])),
        _row(f"{label}: 95%", found, lambda one: show(one.quantiles[1])),
        _row(f"{label}: largest", found, lambda one: show(one.quantiles[2])),
        _row(f"{label}: nearer than held out", found, lambda one: _with_error(one.nearer, one.nearer_error)),
    ]


def _row(label: str, results: Mapping[str, _T], show: Callable[[_T], str]) -> TableRow:
    return label, [show(one) for one in results.values()]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _with_error(value: float, error: float, digits: int = 3) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"
