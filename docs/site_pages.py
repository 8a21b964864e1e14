"""What the site shows beyond docs/: MkDocs runs this module as a hook (mkdocs.yml, `make docs`).

- Pages and pictures that pages of docs/ or README.md link to, wherever they lie in the repository. Links stay as they
  are in the files, so that they work in the repository too; here they become links of the site.
- `reference/flags.md`: the flags of each program, read from its parser, so that the page cannot be out of date.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from utils.cli.parser import DataclassParser

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HOME = "README.md"
FLAGS_PAGE = "reference/flags.md"
# {program: names of its dataclasses of flags, or of a tuple of them}
PROGRAMS = {
    "train_clm": ("GROUPS",),
    "train_classifier": ("GROUPS",),
    "inference_generation_instruction": ("GROUPS",),
    "inference_generation_dataset": ("GROUPS",),
    "scripts.look": ("GROUPS",),
    "scripts.push": ("PushArguments",),
    "scripts.generate_train_command": ("JobArguments",),
    "scripts.generate_inference_command": ("JobArguments",),
    "scripts.prepare_conversations": ("ConversationArguments",),
    "scripts.resample_with_dp_histogram": ("ResamplingArguments",),
    "scripts.annotate": ("GROUPS",),
    "scripts.split_dataset": ("SplitArguments",),
    "scripts.evaluate_synthetic": ("GROUPS",),
    "scripts.compare_modes": ("GROUPS",),
    "scripts.merge": ("GROUPS",),
    "scripts.convert_gguf": ("GROUPS",),
    "scripts.predict": ("GROUPS",),
    "scripts.attack": ("GROUPS",),
    "scripts.plan": ("GROUPS",),
}

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_ELSEWHERE = re.compile(r"[a-z][a-z+.-]*:|#|/")  # another host, this page, or an address of the site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, and the page of flags."""
    from mkdocs.structure.files import File

    for path in outside_files(ROOT):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, FLAGS_PAGE, content=flags_page()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """The page with links of the site instead of links of the repository."""
    return with_site_links(markdown, page.file.src_uri, ROOT)


def outside_files(root: Path) -> list[str]:
    """Paths of the files outside docs/ that README.md and the pages in docs/ reach by links, README.md included."""
    waiting = [HOME, *(path.relative_to(root).as_posix() for path in sorted((root / "docs").rglob("*.md")))]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in _linked(root / page, root):
            if target not in seen:
                seen.add(target)
                if target.endswith(".md"):
                    waiting.append(target)
    return sorted(path for path in seen if not path.startswith("docs/"))


def with_site_links(markdown: str, page: str, root: Path) -> str:
    """A page's text with each link to a file of the repository made relative to where the site has it.

    Args:
        markdown: the text.
        page: the page's path on the site. Pages of docs/ lie at the top there, other files where the repository has
            them.
        root: the repository.
    """
    on_disk = f"docs/{page}" if (root / "docs" / page).is_file() else page

    def replaced(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        name, sharp, heading = link.partition("#")
        if _ELSEWHERE.match(link):
            return found.group(0)
        target = _resolved(on_disk, name).removeprefix("docs/")
        return f"{before}{os.path.relpath(target, PurePosixPath(page).parent)}{sharp}{heading}{after}"

    return _LINK.sub(replaced, markdown)


def flags_page() -> str:
    """Markdown tables of the flags of each program in `PROGRAMS`."""
    parts = ["# Flags", "`--flag_name` and `--flag-name` are the same flag."]
    for program, names in PROGRAMS.items():
        module = importlib.import_module(program)
        command = f"python -m {program}" if program.startswith("scripts.") else f"{program}.py"
        parts.append(f"## {command}")
        parts.extend(_tables(DataclassParser(list(_dataclasses(module, names)), None)))
    return "\n\n".join(parts) + "\n"


def _dataclasses(module: object, names: tuple[str, ...]) -> Iterator[type]:
    for name in names:
        value = getattr(module, name)
        yield from (value if isinstance(value, tuple) else (value,))


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """For each group of flags its title and its table."""
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if not _is_help_or_off(action)]
        if rows:
            yield f"### {(group.title or 'flags').capitalize()}"
            yield "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])


def _is_help_or_off(action: argparse.Action) -> bool:
    return isinstance(action, argparse._HelpAction | argparse._StoreFalseAction)


def _row(action: argparse.Action) -> str:
    meaning = str(action.help or "").replace("%%", "%")
    if action.choices:
        meaning += f" ({', '.join(map(str, action.choices))})"
    default = "required" if action.required else "" if action.default is None else f"`{action.default}`"
    name = action.option_strings[0] if action.option_strings else action.dest.upper()
    cells = (f"`{name}`", default, meaning)
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _linked(page: Path, root: Path) -> Iterator[str]:
    """Paths of the files that a page links to."""
    for _, link, _ in _LINK.findall(page.read_text(encoding="utf-8")):
        if not _ELSEWHERE.match(link):
            target = _resolved(page.relative_to(root).as_posix(), link.partition("#")[0])
            if (root / target).is_file():
                yield target


def _resolved(page: str, name: str) -> str:
    """The path from the root of what a page's link names."""
    return os.path.normpath(PurePosixPath(page).parent / name).replace(os.sep, "/")
