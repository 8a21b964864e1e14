r"""Change a published folder in ways that would mislead its reader, one at a time, and verify each.

    python -m benchmarks.tampering OUT --output benchmarks/results/NAME.md

OUT is the folder of a finished private run, such as that of `make demo`. After each change SHA256SUMS is written
anew, except for the weights, which nothing else vouches for. The exit status is 1 if a change passes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.tables import machine, publish
from dptune._validate import InvalidArgument
from dptune.published import published_part
from dptune.report.checksums import CHECKSUMS_NAME, write_checksums
from dptune.verify import verify

LEDGER, REPORT, CARD = "ledger.jsonl", "privacy_report.json", "README.md"
_WEIGHTS = "*.safetensors"


class Change(NamedTuple):
    """One change.

    Attributes:
        name: what is changed, for the table.
        make: changes the folder.
        sums: whether SHA256SUMS is written anew afterwards.
    """

    name: str
    make: Callable[[Path], None]
    sums: bool = True


def _lines(change: Callable[[list[str]], list[str]], name: str = LEDGER) -> Callable[[Path], None]:
    """A change of the lines of a file."""

    def make(folder: Path) -> None:
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(change(lines)), encoding="utf-8")

    return make


def _entry(**values: Any) -> Callable[[Path], None]:
    """A change of the last step in the ledger."""
    return _lines(lambda lines: [*lines[:-1], json.dumps(json.loads(lines[-1]) | values) + "\n"])


def _report(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """A change of fields of the report."""

    def make(folder: Path) -> None:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        (folder / REPORT).write_text(json.dumps(report | change(report)), encoding="utf-8")

    return make


def _card(old: str, new: str) -> Callable[[Path], None]:
    """A change of the card's text, by a regular expression that must be found."""

    def make(folder: Path) -> None:
        text, count = re.subn(old, new, (folder / CARD).read_text(encoding="utf-8"))
        if not count:
            raise RuntimeError(f"the card has nothing like {old!r}")
        (folder / CARD).write_text(text, encoding="utf-8")

    return make


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _add(name: str, text: str = "{}") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return make


def _flip(folder: Path) -> None:
    """One bit in the middle of the weights."""
    path = next(iter(sorted(folder.glob(_WEIGHTS))))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _replace_weights(folder: Path) -> None:
    """The whole file of weights by another."""
    next(iter(sorted(folder.glob(_WEIGHTS)))).write_bytes(b"other weights")


def _link(folder: Path) -> None:
    secret = folder.parent / "secret.json"
    secret.write_text("{}", encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").symlink_to(secret)


def _path_in_config(folder: Path) -> None:
    name = "adapter_config.json" if (folder / "adapter_config.json").is_file() else "config.json"
    key = "base_model_name_or_path" if name.startswith("adapter") else "_name_or_path"
    found = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(found | {key: "/home/ann/models/base"}), encoding="utf-8")


CHANGES = (
    Change("ledger: last step cut off", _lines(lambda lines: lines[:-1])),
    Change("ledger: a step in the middle cut out", _lines(lambda lines: [*lines[:1], *lines[2:]])),
    Change("ledger: a step twice", _lines(lambda lines: [*lines, lines[-1]])),
    Change("ledger: emptied", _lines(lambda _: [])),
    Change("ledger: last line torn", _lines(lambda lines: [*lines[:-1], lines[-1][:20]])),
    Change("ledger: missing", _remove(LEDGER)),
    Change("ledger: one step with less noise", _entry(noise_multiplier=0.1)),
    Change("ledger: one step with a larger sampling probability", _entry(sampling_probability=0.9)),
    Change("ledger: one step for groups of 8", _entry(group_size=8)),
    Change("ledger: one step with a repeatable key of the noise", _entry(noise_key="fixed")),
    Change("ledger: one step drawn by an unknown sampler", _entry(sampler="shuffled")),
    Change("ledger: no JSON", _lines(lambda lines: ["nothing\n", *lines[1:]])),
    Change("report: half the epsilon", _report(lambda one: {"epsilon": one["epsilon"] / 2})),
    Change("report: epsilon at a ten times larger delta", _report(lambda one: {"delta": one["delta"] * 10})),
    Change("report: twice the noise", _report(lambda one: {"noise_multiplier": one["noise_multiplier"] * 2})),
    Change("report: fewer steps", _report(lambda one: {"steps": one["steps"] - 1})),
    Change("report: no group of that size ran", _report(lambda one: {"group_size": one["group_size"] + 1})),
    Change("report: reasons against its own guarantee", _report(lambda _: {"reasons": ["the noise was off"]})),
    Change("report: an unknown field", _report(lambda _: {"training_loss": 2.1})),
    Change("report: missing", _remove(REPORT)),
    Change("card: a smaller epsilon", _card(r"ε = \d+(\.\d+)?", "ε = 0.1")),
    Change("card: no epsilon", _card(r"ε = \d+(\.\d+)?", "a small ε")),
    Change("card: another privacy unit in its table", _card(r"(?m)^(\| *[Pp]rivacy unit *\|).*$", r"\1 all people |")),
    Change("card: missing", _remove(CARD)),
    Change("weights: one bit", _flip, sums=False),
    Change("weights: another file", _replace_weights, sums=False),
    Change("weights: a second adapter beside the first", _add("model.safetensors", "more"), sums=False),
    Change("added: the diagnostics file", _add("diagnostics.jsonl", '{"loss": 2.1}\n')),
    Change("added: a checkpoint", _add("checkpoint-10/state.json")),
    Change("added: the training data", _add("train.jsonl", '{"text": "about a person"}\n')),
    Change("added: a link to a file elsewhere", _link, sums=False),
    Change("configuration: names a path on a machine", _path_in_config),
    Change("checksums: missing", _remove(CHECKSUMS_NAME), sums=False),
    Change("checksums: a line that is none", _lines(lambda lines: ["sound\n", *lines], CHECKSUMS_NAME), sums=False),
)


def tamper(published: Path, change: Change) -> str | None:
    """Change a copy of the folder and verify it.

    Returns:
        The line with which it is refused; None if it passes.
    """
    with TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(published, Path(parent) / "publish"))
        left_out = _not_listed(folder)
        change.make(folder)
        if change.sums:
            write_checksums(folder, but=left_out)
        try:
            verify(folder)
        except InvalidArgument as error:
            return str(error).replace(f"{parent}/", "")
    return None


def _not_listed(folder: Path) -> set[str]:
    """Files that the folder's checksums leave out."""
    listed = {line.split("  ", 1)[1] for line in (folder / CHECKSUMS_NAME).read_text("utf-8").splitlines()}
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - listed


def main() -> None:
    """Print a table of all changes; the exit status is 1 if one passes, or if the folder itself does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished private run")
    parser.add_argument("--output", help="file for the table. Default: print it only")
    given = parser.parse_args()
    folder = published_part(given.run)
    try:
        unchanged = verify(folder)
    except InvalidArgument as error:
        raise SystemExit(f"error: the folder is refused as it is: {error}") from None
    found = {change.name: tamper(folder, change) for change in CHANGES}
    refused = sum(line is not None for line in found.values())
    rows = [f"| {name} | {'**passes**' if line is None else line.replace('|', ' ')} |" for name, line in found.items()]
    parts = [
        "# Tampered folders",
        machine("benchmarks.tampering", torch.device("cpu"), ["OUT"]),
        f"The folder as the run left it is verified. Of {len(found)} changes, {refused} are refused.",
        "\n".join(["```", *unchanged, "```"]),
        "\n".join(["| change | refused with |", "| --- | --- |", *rows]),
    ]
    publish(parts, given.output)
    raise SystemExit(0 if refused == len(found) else 1)


if __name__ == "__main__":
    main()
