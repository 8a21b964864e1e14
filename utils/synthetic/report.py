"""One self-contained page on how synthetic text compares with real text: tables, how to read them, plots.

It holds numbers and the names of the samples, and quotes no text. Names come from the command line and file names: they
are escaped, and the page forbids scripts. It is computed on real rows and says on top that it is not private.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.synthetic.arguments import HELD_OUT, REFERENCE
from utils.synthetic.divergence import Divergence
from utils.synthetic.evaluation import Lengths, Overlap, Words
from utils.synthetic.overlap import Nearness
from utils.synthetic.plots import plot_accuracies, plot_curves, plot_lengths, plot_ranks, plot_tails

_TEMPLATE_NAME = "report.html.jinja"

TableRow = tuple[str, list[str]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Plot:
    """An image as a data address, and what it shows."""

    image: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A table with a row a number and a column a sample, how to read it, and its plots."""

    title: str
    explanation: str
    columns: list[str]
    rows: list[TableRow]
    plots: list[Plot] = field(default_factory=list)


def render(
    warning: str, introduction: Sequence[str], sections: Sequence[Section], settings: Mapping[str, object]
) -> str:
    """The page."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template(_TEMPLATE_NAME)
    return template.render(warning=warning, introduction=introduction, sections=sections, settings=settings)


def divergence_section(results: Mapping[str, Divergence], texts: int) -> Section:
    """MAUVE and its like."""
    some = next(iter(results.values()))
    rows = [
        _row("MAUVE", results, lambda one: _with_error(one.mauve, one.mauve_error)),
        _row("MAUVE, smoothed", results, lambda one: _number(one.mauve_star)),
        _row("frontier integral", results, lambda one: _number(one.frontier_integral)),
        _row("real text missed", results, lambda one: _percent(one.missed)),
        _row("text unlike any real", results, lambda one: _percent(one.spurious)),
    ]
    explanation = (
        f"Texts are placed by what they are about, {texts} of each sample, and grouped into {some.clusters} clusters. "
        f"MAUVE compares how each sample spreads over them: 1 is the same as real text, 0 nothing in common, ± is a "
        f"standard error. Judge by the column “{HELD_OUT}”: other real text scores that. The frontier integral "
        "runs the other way, 0 is best. The last two rows count texts in clusters that the other side never enters."
    )
    plot = Plot(
        plot_curves({name: one.curve for name, one in results.items()}),
        "Divergence curves: MAUVE is the area below. One that is low at its right end misses kinds of real text; one "
        "that is short at its upper end has kinds that real text lacks.",
    )
    return Section("As a whole", explanation, list(results), rows, [plot])


def words_section(words: Words) -> Section:
    """Vocabulary."""
    results = words.columns
    rows = [
        _row("different words", results, lambda one: f"{one.size:,}"),
        _row("its words unseen in real text", results, lambda one: _percent(one.unseen)),
        _row("real words it lacks", results, lambda one: _percent(one.missed)),
        _row("distinct-1", results, lambda one: _number(one.distinct[0])),
        _row("distinct-2", results, lambda one: _number(one.distinct[1])),
        _row("distinct-3", results, lambda one: _number(one.distinct[2])),
        _row("word frequencies apart (bits)", results, lambda one: _number(one.frequency_divergence)),
    ]
    explanation = (
        f"Each sample is cut to {words.words:,} words, for a longer one always has more different words. A model that "
        "repeats itself has few of them and a low distinct-2; one that babbles has many unseen ones. The last row is "
        "the Jensen-Shannon divergence of the word frequencies, 0 for equal and 1 for nothing in common; two real "
        f"samples differ by chance as much as the column “{HELD_OUT}” says."
    )
    plot = Plot(plot_ranks(words.curves), "Word frequencies by rank. Real text falls off in nearly a straight line.")
    return Section("Words", explanation, list(results), rows, [plot])


def lengths_section(lengths: Lengths, unit: str) -> Section:
    """Lengths in one unit."""
    results = {**lengths.columns, REFERENCE: lengths.reference}
    labels = [f"{who} at most" for who in ("5% are", "a quarter is", "half is", "three quarters are", "95% are")]
    rows = [_row("mean", results, lambda one: f"{one.mean:,.1f}")]
    for label, values in zip(labels, zip(*(one.quantiles for one in results.values()), strict=True), strict=True):
        rows.append((label, [f"{value:,.0f}" for value in values]))
    rows.append(_row(f"apart ({unit})", results, lambda one: f"{one.wasserstein:,.1f}"))
    rows.append(_row("largest gap in shares (KS)", results, lambda one: _number(one.ks)))
    rows.append(_row("chance of such a gap", results, lambda one: f"{one.ks_p:.2g}"))
    explanation = (
        "“Apart” is Wasserstein's distance: by how much lengths would have to change on average to be the reference's, "
        "the other half of the held-out texts. A chance near 0 says that the lengths differ by more than luck."
    )
    plot = Plot(plot_lengths(lengths.values, f"{unit} (logarithmic)"), "Share of texts by length.")
    return Section(f"Length in {unit}", explanation, list(results), rows, [plot])


def proxy_section(results: Mapping[str, Mapping[str, float]], description: str) -> Section:
    """Train on synthetic, test on real."""
    rows = [
        _row("accuracy", results, lambda one: _with_error(one["accuracy"], one["accuracy_error"], digits=4)),
        _row("nats a token", results, lambda one: _number(one["nats_per_token"])),
        _row("bits a byte", results, lambda one: _number(one["bits_per_byte"])),
    ]
    explanation = (
        f"{description} It is then tested on all held-out real texts: accuracy is the share of tokens that it guesses "
        "from those before, ± a standard error over texts. Good synthetic text teaches nearly as much as real rows do. "
        "Nats and bits are the cross-entropy, less is better."
    )
    plot = Plot(plot_accuracies(results), "Next-token accuracy on held-out real text, with two standard errors.")
    return Section("Train on synthetic, test on real", explanation, list(results), rows, [plot])


def overlap_section(results: Mapping[str, Overlap], passage_words: int, file_name: str) -> Section:
    """What is shared with the training rows."""
    rows = [
        _row("copies of a training row", results, lambda one: f"{one.copies} ({_percent(one.copies / one.texts)})"),
        _row(
            f"share {passage_words} words or more, or are copies",
            results,
            lambda one: f"{one.passages} ({_percent(one.passages / one.texts)})",
        ),
        *_nearness_rows("longest passage (words)", results, lambda one: one.passage, lambda value: f"{value:,.0f}"),
        *_nearness_rows("most similar row (cosine)", results, lambda one: one.similarity, _number),
    ]
    explanation = (
        f"Memorising shows as synthetic text being nearer to the training rows than the column “{HELD_OUT}” is, which "
        "no generator was trained on: “nearer than held out” is 0.5 without it, above 0.5 with it (± a standard error; "
        "short texts share short passages, so compare samples of like lengths). The passages themselves are in "
        f"{file_name}, which must stay where the training rows are."
    )
    plots = [
        Plot(
            plot_tails({name: one.lengths for name, one in results.items()}, "words (logarithmic)", logarithmic=True),
            "Share of texts by the longest passage that they share with a training row.",
        ),
        Plot(
            plot_tails({n: one.similarities for n, one in results.items()}, "cosine similarity", logarithmic=False),
            "Share of texts by their similarity to the most similar training row.",
        ),
    ]
    return Section("In common with the training rows", explanation, list(results), rows, plots)


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
