"""What an audit leaves in its folder: audit.json for programs, audit.md and audit.png for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dptune._files import atomic_write
from dptune.audit.checks import Finding
from dptune.report.plots import plot_bounds
from dptune.report.statement import versions

JSON_NAME, PAGE_NAME, PLOT_NAME = "audit.json", "audit.md", "audit.png"
NOT_PRIVATE = "NOT PRIVATE - do not publish: this page tells of single rows of the training data."
SIMULATED = "Nothing here was measured on the run's data: every game was played on rows that were made up."
MEANING = (
    "Every bound is a lower bound. One above the stated epsilon shows that something is wrong. One below it shows no "
    "fault, and does not prove that there is none."
)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is written.

    Attributes:
        kind: "mechanism" or "training".
        verdict: one line.
        contradicted: whether the audit contradicts what is stated.
        epsilon: the lower bound that sums the audit up; None if there is none.
        stated_epsilon: what that is compared with; None if unknown.
        delta: of all epsilons.
        confidence: with which all findings together are right.
        findings: the bounds and tests.
        settings: what was audited, and how much was played.
        private: whether the folder may be published.
    """

    kind: str
    verdict: str
    contradicted: bool
    epsilon: float | None
    stated_epsilon: float | None
    delta: float
    confidence: float
    findings: Sequence[Finding]
    settings: Mapping[str, object]
    private: bool
    versions: Mapping[str, str] = field(default_factory=lambda: versions(("scipy", "numpy")))


def write_page(folder: Path, page: Page) -> None:
    """Write the three files. The picture is left out if no finding is about epsilon."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(page) | {"note": _note(page)}, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(folder / JSON_NAME) as file:
        file.write(text + "\n")
    rows = [(one.question, one.found, one.stated) for one in page.findings if one.measured.startswith("epsilon")]
    if rows:
        plot_bounds(folder / PLOT_NAME, rows, delta=page.delta, private=page.private)
    with atomic_write(folder / PAGE_NAME) as file:
        file.write(page_as_markdown(page, with_plot=bool(rows)))


def page_as_markdown(page: Page, *, with_plot: bool) -> str:
    """The page for people."""
    rows = [
        f"| {one.question} | {one.measured} | {one.found:.4g} | {one.stated:.4g} | {one.observations:,} | "
        f"{'**CONTRADICTED**' if one.contradicted else 'no contradiction'} |"
        for one in page.findings
    ]
    lines = [
        f"# Audit of a {page.kind}",
        "",
        f"**{page.verdict}**",
        "",
        _note(page),
        "",
        MEANING,
        "",
        f"All findings together are right with a probability of at least {page.confidence:g}. "
        f"Every epsilon is at delta {page.delta:g}.",
        "",
        *([f"![bounds on epsilon beside what is stated]({PLOT_NAME})", ""] if with_plot else []),
        "| question | measured | found | stated | observations | |",
        "|---|---|---:|---:|---:|---|",
        *rows,
        "",
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in {**page.settings, **page.versions}.items()),
        "",
    ]
    return "\n".join(lines)


def _note(page: Page) -> str:
    return SIMULATED if page.private else NOT_PRIVATE
