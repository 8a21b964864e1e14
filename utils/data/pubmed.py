"""Abstracts from PubMed: the XML files of the US National Library of Medicine (NLM), or a JSONL of abstracts.

The privacy unit is one paper, so a paper must not appear twice. NLM's files hold a paper once per revision: the last
revision wins, by file name and then by position in the file, and citations that NLM deleted are removed.

XML is read as a stream, one citation at a time: a file of 30,000 citations is about 200 MB when unpacked.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from io import BufferedIOBase
from pathlib import Path
from typing import IO
from xml.etree import ElementTree
from xml.parsers import expat

from dptune._validate import InvalidArgument, refuse
from utils.data.named_sets import FIRST_DAY, LAST_DAY
from utils.files.cells import is_text
from utils.files.tables import Row, show_columns, stream_rows

_FLAG = "--dataset_name"
_ROOT = "PubmedArticleSet"
# The day on which PubMed added the paper, which every citation has. A journal's date often lacks the day ("2023
# Summer") and may be months later. "entrez" is the same event in records without "pubmed".
_DATE_STATUSES = ("pubmed", "entrez")
_UNREADABLE = (ElementTree.ParseError, expat.ExpatError, EOFError, OSError, zlib.error, ValueError, LookupError)


@dataclass(frozen=True)
class DayRange:
    """Days from `first` to `last`, inclusive."""

    first: date
    last: date

    @classmethod
    def parse(cls, first: str = FIRST_DAY, last: str = LAST_DAY) -> DayRange:
        """From ISO dates.

        >>> date(2023, 8, 7) in DayRange.parse("2023-08-01", "2023-08-07")
        True
        """
        days = cls(_flag_day("--date_from", first), _flag_day("--date_to", last))
        if days.first > days.last:
            refuse("--date_from", first, f"is later than --date_to {last}; swap them")
        return days

    def __contains__(self, day: date) -> bool:
        return self.first <= day <= self.last

    def __str__(self) -> str:
        return f"{self.first} to {self.last}"


def abstract_files(folder: str | Path, *, held_out: bool = False) -> list[Path]:
    """The files of a folder in the order in which later ones replace papers of earlier ones; possibly none.

    Args:
        folder: holds either NLM's XML (`*.xml.gz`, `*.xml`) or `*.jsonl` (rows with `abstract` or `text`, and
            optionally `pmid` and an ISO `date`).
        held_out: the files of the validation set, `validation*.jsonl`, instead of all others.

    Raises:
        InvalidArgument: the folder has both kinds.
    """
    folder = Path(folder)
    if held_out:
        return sorted(folder.glob("validation*.jsonl"))
    xml = sorted([*folder.glob("*.xml"), *folder.glob("*.xml.gz")], key=lambda p: p.name.removesuffix(".gz"))
    jsonl = sorted(p for p in folder.glob("*.jsonl") if not p.name.startswith("validation"))
    if xml and jsonl:
        refuse(_FLAG, "pubmed_generation", f"{folder} has XML and JSONL; keep one kind, or papers may count twice")
    return xml or jsonl


def stream_abstracts(folder: str | Path, days: DayRange, texts: IO[bytes], *, held_out: bool = False) -> Iterator[str]:
    """The abstracts of a folder, each paper once. The texts of all papers stay on disk, their keys in memory.

    Args:
        folder, held_out: see `abstract_files`.
        days: which papers to take, by PubMed's date; JSONL rows without a date are always taken.
        texts: an empty file, open for writing and reading, where the abstracts wait until the last file was read.

    Raises:
        InvalidArgument: the folder has no data (says what to put there) or both kinds, a file is damaged, or no paper
            is in `days`; validation files may lack papers.
    """
    files = abstract_files(folder, held_out=held_out)
    if not files:
        refuse(_FLAG, "pubmed_generation", _what_to_put(Path(folder), days))
    is_xml = not files[0].name.endswith(".jsonl")
    papers: dict[bytes, int] = {}  # the paper's key -> where its abstract begins in `texts`
    for key, abstract in _from_xml(files, days) if is_xml else _from_jsonl(files, days):
        if is_xml or abstract is None:  # a paper's last revision has the last place in XML, and its first in JSONL
            papers.pop(key, None)
        if abstract is not None:
            papers[key] = texts.seek(0, os.SEEK_END)
            written = abstract.encode()
            texts.write(len(written).to_bytes(8, "big") + written)
    if not papers and not held_out:
        remedy = f"no abstract from {days} in {folder}; add files or change --date_from, --date_to"
        refuse(_FLAG, "pubmed_generation", remedy)
    for start in papers.values():
        texts.seek(start)
        yield texts.read(int.from_bytes(texts.read(8), "big")).decode()


def _what_to_put(folder: Path, days: DayRange) -> str:
    """The remedy for an empty folder."""
    return (
        f"no data in {folder}; put the pubmed*.xml.gz files of the National Library of Medicine for {days} there (from "
        "its public FTP site, folders pubmed/baseline and pubmed/updatefiles), or a train.jsonl with one "
        '{"abstract": "..."} per line'
    )


def _flag_day(flag: str, value: str) -> date:
    """An ISO date from the command line."""
    try:
        return date.fromisoformat(value)
    except ValueError:
        refuse(flag, value, "give a day as YYYY-MM-DD")


def _key(text: str) -> bytes:
    """What papers are compared by: a hash, which is shorter than most texts."""
    return hashlib.sha256(text.encode()).digest()[:16]


def _from_jsonl(files: list[Path], days: DayRange) -> Iterator[tuple[bytes, str | None]]:
    """(key, abstract) of each row; the key is the `pmid`, or the text of a row without one. None is out of range."""
    for path in files:
        number = 0
        for number, row in enumerate(stream_rows(path, _FLAG), start=1):
            abstract = _row_abstract(row, path, number)
            key = _key(f"text {abstract}" if row.get("pmid") is None else f"pmid {row['pmid']}")
            yield key, abstract if abstract and _row_in_range(row, days, path, number) else None
        if not number:
            refuse(_FLAG, str(path), "is empty; give a file with at least one row")


def _row_abstract(row: Row, path: Path, number: int) -> str:
    """The `abstract` of a row, or its `text`."""
    name = next((name for name in ("abstract", "text") if name in row), None)
    if name is None:
        refuse(_FLAG, str(path), f"row {number} has the columns {show_columns(row)}; name one of them abstract or text")
    if not is_text(row[name]):
        refuse(_FLAG, str(path), f"row {number}: {name} is not text; give a string or leave the row out")
    return str(row[name]).strip()


def _row_in_range(row: Row, days: DayRange, path: Path, number: int) -> bool:
    """Whether a row's date is in the range; True if it has no date."""
    if row.get("date") is None:
        return True
    try:
        return date.fromisoformat(str(row["date"])) in days
    except ValueError:
        refuse(_FLAG, str(path), f"row {number}: date is not YYYY-MM-DD; fix it or leave it out")


def _from_xml(files: list[Path], days: DayRange) -> Iterator[tuple[bytes, str | None]]:
    """(key, abstract) of each revision; None if it has no abstract or is out of range, and for a deleted citation."""
    for path in files:
        for element in _stream(path):
            if element.tag == "DeleteCitation":
                yield from ((_key((pmid.text or "").strip()), None) for pmid in element.findall("PMID"))
                continue
            key, abstract, day = _key(_pmid(element, path)), _abstract(element), _pubmed_day(element)
            yield key, abstract if abstract and day is not None and day in days else None


def _stream(path: Path) -> Iterator[ElementTree.Element]:
    """Yields each PubmedArticle and DeleteCitation of a file; each is valid until the next is requested."""
    try:
        with _open(path) as file:
            _refuse_entities(file, path)
            file.seek(0)
            yield from _elements(file, path)
    except InvalidArgument:
        raise
    except _UNREADABLE as error:
        refuse(_FLAG, str(path), f"damaged or incomplete ({type(error).__name__}); download the file again")


def _open(path: Path) -> BufferedIOBase:
    """The file's bytes, unpacked."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _elements(file: BufferedIOBase, path: Path) -> Iterator[ElementTree.Element]:
    """Parse a file, freeing each citation (and the root's reference to it) after it was used."""
    root: ElementTree.Element | None = None
    for event, element in ElementTree.iterparse(file, events=("start", "end")):
        if root is None:
            root = element
            if root.tag != _ROOT:
                refuse(_FLAG, str(path), f"not a PubMed file (its root is not {_ROOT}); move it elsewhere")
        elif event == "end" and element.tag in ("PubmedArticle", "PubmedBookArticle", "DeleteCitation"):
            if element.tag != "PubmedBookArticle":
                yield element
            root.clear()


class _PrologRead(Exception):
    """The first element has started, so no declaration can follow."""


def _refuse_entities(file: BufferedIOBase, path: Path) -> None:
    """Refuse XML entities, which can expand a small file to gigabytes. NLM's files declare none."""

    def declared(*_: object) -> None:
        refuse(_FLAG, str(path), "declares XML entities, which NLM's files never do; download it from NLM")

    def started(*_: object) -> None:
        raise _PrologRead

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = declared
    parser.StartElementHandler = started
    try:
        parser.ParseFile(file)
    except _PrologRead:
        return


def _pmid(article: ElementTree.Element, path: Path) -> str:
    """The paper's PMID. (A citation also holds PMIDs of papers that it comments on, at deeper levels.)"""
    pmid = (article.findtext("MedlineCitation/PMID") or "").strip()
    if not pmid:
        refuse(
            _FLAG, str(path), "has a citation without PMID, so papers cannot be distinguished; download the file again"
        )
    return pmid


def _abstract(article: ElementTree.Element) -> str:
    """The English abstract as one paragraph without markup, each part after its label; "" if there is none."""
    parts = []
    for part in article.iterfind("MedlineCitation/Article/Abstract/AbstractText"):
        text = " ".join("".join(part.itertext()).split())
        label = part.get("Label", "").strip()
        if text:
            parts.append(f"{label}: {text}" if label and label != "UNLABELLED" else text)
    return " ".join(parts)


def _pubmed_day(article: ElementTree.Element) -> date | None:
    """The day on which PubMed added the paper; None, which leaves the paper out, if the record has none."""
    for status in _DATE_STATUSES:
        found = article.find(f"PubmedData/History/PubMedPubDate[@PubStatus='{status}']")
        if found is not None:
            try:
                return date(*(int(found.findtext(part) or "") for part in ("Year", "Month", "Day")))
            except ValueError:
                continue
    return None
