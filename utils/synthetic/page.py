"""A self-contained page of results: tables, explanations, plots.

Names come from the command line and file names, so they are escaped and the page forbids scripts. Such a page is
computed on real rows and says at the top that it is not private.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATE_NAME = "page.html.jinja"

TableRow = tuple[str, list[str]]


@dataclass(frozen=True)
class Plot:
    """An image as a data URL, and its caption."""

    image: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A table, its explanation, and its plots. Each row has a label and a cell for each column."""

    title: str
    explanation: str
    columns: list[str]
    rows: list[TableRow]
    plots: list[Plot] = field(default_factory=list)


def render(
    title: str,
    warning: str,
    introduction: Sequence[str],
    sections: Sequence[Section],
    settings: Mapping[str, object],
) -> str:
    """The page, as HTML.

    Args:
        title: its heading.
        warning: the line above all.
        introduction: paragraphs before the sections.
        sections: in order.
        settings: shown in small print at the end.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template(_TEMPLATE_NAME)
    return template.render(
        title=title, warning=warning, introduction=introduction, sections=sections, settings=settings
    )
