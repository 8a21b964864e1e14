r"""Tag a release: an annotated tag vX.Y.Z whose message is the changelog's section of that version.

    python -m scripts.release 0.2.0 --dry_run    # says what is missing, and shows the message
    python -m scripts.release 0.2.0              # makes the tag; push it with `git push --tags`

Before that, set the version in pyproject.toml, dptune/__init__.py and CITATION.cff, turn `## [Unreleased]` of
CHANGELOG.md into `## [0.2.0] - YYYY-MM-DD`, and commit.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import refuse
from utils.cli.flags import exit_on_invalid_argument, parse

ROOT = Path(__file__).resolve().parents[1]
# Files that state the version, and how.
_VERSIONS = {
    "pyproject.toml": r'^version = "(.+)"$',
    "dptune/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
}


@dataclass
class ReleaseArguments:
    """What to release."""

    _argument_group_name = "release"

    version: str = field(metadata={"help": "version, such as 0.2.0", "positional": True})
    dry_run: bool = field(default=False, metadata={"help": "show the tag's message, and make no tag"})


@exit_on_invalid_argument(ReleaseArguments)
def main(argv: Sequence[str] | None = None) -> None:
    """Check that the version is the same everywhere, then make the tag."""
    (given,) = parse(ReleaseArguments, args=argv, description=__doc__)
    if not re.fullmatch(r"\d+\.\d+\.\d+", given.version):
        refuse("version", given.version, "give three numbers, such as 0.2.0")
    require_version(ROOT, given.version)
    message = f"dptune {given.version}\n\n{section_of(ROOT, given.version)}\n"
    print(message, end="")
    if not given.dry_run:
        tag(ROOT, given.version, message)
        print(f"tagged v{given.version}; git push --tags publishes it")


def require_version(root: Path, version: str) -> None:
    """Refuse a version that a file of the project does not state."""
    for name, pattern in _VERSIONS.items():
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found is None or found[1] != version:
            refuse("version", version, f"{name} states {found[1] if found else 'none'}; set it there and commit")


def section_of(root: Path, version: str) -> str:
    """The changelog's text about a version, without its heading."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## \[{re.escape(version)}\].*?\n(.*?)(?=^## \[|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        refuse("version", version, f"CHANGELOG.md has no section ## [{version}]; turn [Unreleased] into it")
    return found[1].strip()


def tag(root: Path, version: str, message: str) -> None:
    """Make the annotated tag on a clean tree."""
    if _git(root, "status", "--porcelain"):
        refuse("version", version, "the tree has changes that are not committed; commit or remove them")
    if _git(root, "tag", "--list", f"v{version}"):
        refuse("version", version, f"the tag v{version} exists; give the next version")
    _git(root, "tag", "--annotate", "--cleanup=verbatim", f"v{version}", "--message", message)


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        refuse("git", words[0], f"failed: {' '.join(done.stderr.split()) or 'no message'}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
