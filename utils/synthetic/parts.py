"""The parts of a comparison of synthetic with real text, each as JSON values and as sections of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dptune._files import atomic_write
from utils.files.jsonl import without_nan, write_json, write_jsonl
from utils.synthetic.arguments import HELD_OUT, REFERENCE, ProxyArguments, StatisticsArguments, TextArguments
from utils.synthetic.embeddings import make_embedder
from utils.synthetic.evaluation import (
    Overlap,
    divergences,
    embed_columns,
    lengths,
    memorised_rows,
    overlaps,
    vocabularies,
)
from utils.synthetic.page import Section, render
from utils.synthetic.proxy_results import EVALUATION_NOTICE, train_proxies
from utils.synthetic.proxy_settings import TINY
from utils.synthetic.report import (
    divergence_section,
    lengths_section,
    overlap_section,
    proxy_section,
    words_section,
)
from utils.synthetic.texts import Comparison

JSON_NAME, PAGE_NAME = "evaluation.json", "evaluation.html"
MEMORISED_NAME = "diagnostics_memorised.jsonl"
TITLE = "Synthetic text compared with real text"
MUST_NOT_BE_PUBLISHED = "NOT PRIVATE: these passages may be people's own texts. This file must not be published."

EvaluationPart = tuple[str, object, list[Section]]  # name in the JSON file, its content, sections of the page


def evaluate(
    folder: Path, comparison: Comparison, texts: TextArguments, statistics: StatisticsArguments, proxy: ProxyArguments
) -> Iterator[EvaluationPart]:
    """Yield one part after the other. Passages that look memorised are written to their own file in `folder`."""
    embedder = make_embedder(statistics.embedder, dimensions=statistics.embedding_dimensions, seed=texts.seed)
    embedded = embed_columns(comparison, embedder)
    found = divergences(comparison, embedded, statistics, texts.seed)
    plain = {name: {k: v for k, v in asdict(one).items() if k != "curve"} for name, one in found.items()}
    yield "divergence", plain, [divergence_section(found, comparison.texts_a_column)]
    words = vocabularies(comparison, texts.seed)
    plain_words = {"words": words.words, "columns": {name: asdict(one) for name, one in words.columns.items()}}
    yield "vocabulary", plain_words, [words_section(words)]
    by_unit = lengths(comparison)
    plain_lengths = {
        unit: {name: asdict(c) for name, c in {**one.columns, REFERENCE: one.reference}.items()}
        for unit, one in by_unit.items()
    }
    yield "lengths", plain_lengths, [lengths_section(one, unit) for unit, one in by_unit.items()]
    yield from proxy_part(folder, comparison, proxy, texts)
    (folder / MEMORISED_NAME).unlink(missing_ok=True)  # may be from an earlier run with other files
    if comparison.train is not None:
        overlap = overlaps(comparison, embedded, embedder, statistics.passage_words)
        _write_memorised(folder / MEMORISED_NAME, comparison, overlap, statistics.passage_words)
        section = overlap_section(overlap, statistics.passage_words, MEMORISED_NAME)
        yield "overlap", {name: _plain_overlap(one) for name, one in overlap.items()}, [section]


def proxy_part(
    folder: Path, comparison: Comparison, proxy: ProxyArguments, texts: TextArguments
) -> Iterator[EvaluationPart]:
    """What small models learn from the samples; yields nothing if they are switched off."""
    settings = proxy.settings(texts.seed)
    if settings is None:
        return
    results = dict(train_proxies(folder, comparison, settings, texts.max_texts))
    small = "A small language model, which learns word order over a few words but little meaning,"
    model = small if settings.model == TINY else f"The model {settings.model}"
    description = f"{model} is trained for {settings.steps} steps on each sample, always from the same weights."
    yield "proxy", results, [proxy_section(results, description)]


def write(
    folder: Path, comparison: Comparison, parts: Sequence[EvaluationPart], settings: Mapping[str, object]
) -> None:
    """Write the JSON file and the page, each whole or not at all."""
    counts = {name: {"texts": len(one), "blank": one.blank} for name, one in comparison.columns.items()}
    about = {"not_private": EVALUATION_NOTICE, "settings": settings, "texts_a_column": comparison.texts_a_column}
    content = {**about, "samples": counts, **{name: plain for name, plain, _ in parts}}
    write_json(folder / JSON_NAME, {name: without_nan(part) for name, part in content.items()})
    sections = [section for _, _, of_part in parts for section in of_part]
    with atomic_write(folder / PAGE_NAME) as file:
        file.write(render(TITLE, EVALUATION_NOTICE, _introduction(comparison), sections, settings))


def _introduction(comparison: Comparison) -> list[str]:
    """What is compared, and what is left out."""
    sizes = ", ".join(f"{name}: {len(one):,} texts" for name, one in comparison.synthetic.items())
    blank = sum(one.blank for one in comparison.synthetic.values())
    first = f"{sizes}; {blank:,} blank texts are left out. Held out: {len(comparison.held_out):,} real texts."
    second = (
        "The held-out texts are split in two. One half is the reference that every sample is compared with. The other "
        f"half is the column “{HELD_OUT}”: it shows what perfect synthetic text would score."
    )
    return [first, second]


def _write_memorised(path: Path, comparison: Comparison, overlap: dict[str, Overlap], passage_words: int) -> None:
    warning = {"not_private": MUST_NOT_BE_PUBLISHED}
    write_jsonl(path, [warning, *memorised_rows(comparison, overlap, passage_words)])


def _plain_overlap(one: Overlap) -> dict[str, object]:
    """The numbers, without the values that are only plotted or quoted."""
    counts = {"texts": one.texts, "copies": one.copies, "passages": one.passages}
    return {**counts, "similarity": asdict(one.similarity), "passage": asdict(one.passage)}
