"""Abstracts from PubMed: the XML files that the US National Library of Medicine distributes, or a JSONL of abstracts.

The privacy unit is one paper, so a paper must not appear twice, though NLM's files hold a paper once for each revision:
the last revision wins, by file name and then by place in the file, and a citation that NLM deleted is gone.

XML is read as a stream: a file of 30,000 citations is some 200 MB unpacked, of which one citation is held at a time.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from io import BufferedIOBase
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from dptune._validate import InvalidArgument, refuse
from utils.data.named_sets import FIRST_DAY, LAST_DAY
from utils.files.cells import is_text
from utils.files.tables import Row, read_rows, show_columns

_FLAG = "--dataset_name"
_ROOT = "PubmedArticleSet"
# The day on which PubMed took the paper in. Every citation has one, to the day; a journal's own date often lacks the
# day ("2023 Summer") and may lie months ahead. "entrez" is the same event in records that lack "pubmed".
_DATE_STATUSES = ("pubmed", "entrez")
_UNREADABLE = (ElementTree.ParseError, expat.ExpatError, EOFError, OSError, zlib.error, ValueError, LookupError)


@dataclass(frozen=True)
class DayRange:
    """Days from `first` to `last`, both included."""

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


def load_abstracts(folder: str | Path, days: DayRange) -> list[str]:
    """The abstracts of a folder, each paper once, for training.

    Args:
        folder: holds either NLM's XML (`*.xml.gz`, `*.xml`) or `*.jsonl` (rows with `abstract` or `text`, and perhaps
            `pmid` and an ISO `date`); files named `validation*` are left out.
        days: which papers, by PubMed's date; JSONL rows without a date are all taken.

    Raises:
        InvalidArgument: nothing there (says what to put where), both kinds, a damaged file, or no paper of `days`.
    """
    folder = Path(folder)
    xml = sorted([*folder.glob("*.xml"), *folder.glob("*.xml.gz")], key=lambda p: p.name.removesuffix(".gz"))
    jsonl = sorted(p for p in folder.glob("*.jsonl") if not p.name.startswith("validation"))
    if xml and jsonl:
        refuse(_FLAG, "pubmed_generation", f"{folder} has XML and JSONL; leave one kind, or papers may count twice")
    if not xml and not jsonl:
        refuse(_FLAG, "pubmed_generation", _what_to_put(folder, days))
    abstracts = _from_xml(xml, days) if xml else _from_jsonl(jsonl, days)
    if not abstracts:
        refuse(
            _FLAG, "pubmed_generation", f"no abstract of {days} in {folder}; add files or change --date_from, --date_to"
        )
    return abstracts


def load_validation_abstracts(folder: str | Path, days: DayRange) -> list[str] | None:
    """The abstracts of `validation*.jsonl`, in the format that `load_abstracts` reads; None without such a file."""
    files = sorted(Path(folder).glob("validation*.jsonl"))
    return _from_jsonl(files, days) or None if files else None


def _what_to_put(folder: Path, days: DayRange) -> str:
    """The remedy for an empty folder."""
    return (
        f"no data in {folder}; put there the pubmed*.xml.gz files of the National Library of Medicine (its public FTP "
        f"site, folders pubmed/baseline and pubmed/updatefiles) that cover {days}, or a train.jsonl with one "
        '{"abstract": "..."} a line'
    )


def _flag_day(flag: str, value: str) -> date:
    """An ISO date from the command line."""
    try:
        return date.fromisoformat(value)
    except ValueError:
        refuse(flag, value, "give a day as YYYY-MM-DD")


def _from_jsonl(files: list[Path], days: DayRange) -> list[str]:
    """One abstract for each `pmid`, or for each text where a row has none; the last row of a paper wins."""
    papers: dict[object, str] = {}
    for path in files:
        for number, row in enumerate(read_rows(path, _FLAG), start=1):
            abstract = _row_abstract(row, path, number)
            key = abstract if row.get("pmid") is None else ("pmid", str(row["pmid"]))
            if abstract and _row_in_range(row, days, path, number):
                papers[key] = abstract
            else:
                papers.pop(key, None)
    return list(papers.values())


def _row_abstract(row: Row, path: Path, number: int) -> str:
    """The `abstract` of a row, or its `text`."""
    name = next((name for name in ("abstract", "text") if name in row), None)
    if name is None:
        refuse(_FLAG, str(path), f"row {number} has the columns {show_columns(row)}; name it abstract or text")
    if not is_text(row[name]):
        refuse(_FLAG, str(path), f"row {number}: {name} is not text; give a string or leave the row out")
    return str(row[name]).strip()


def _row_in_range(row: Row, days: DayRange, path: Path, number: int) -> bool:
    """Whether a row's date, if it has one, is wanted."""
    if row.get("date") is None:
        return True
    try:
        return date.fromisoformat(str(row["date"])) in days
    except ValueError:
        refuse(_FLAG, str(path), f"row {number}: date is not YYYY-MM-DD; mend it or leave it out")


def _from_xml(files: list[Path], days: DayRange) -> list[str]:
    """The abstracts of `days` by PMID. A revision that lost its abstract, or left the range, takes the paper out."""
    papers: dict[str, str] = {}
    for path in files:
        for element in _stream(path):
            if element.tag == "DeleteCitation":
                for pmid in element.findall("PMID"):
                    papers.pop((pmid.text or "").strip(), None)
                continue
            key, abstract = _pmid(element, path), _abstract(element)
            day = _pubmed_day(element)
            papers.pop(key, None)
            if abstract and day is not None and day in days:
                papers[key] = abstract
    return list(papers.values())


def _stream(path: Path) -> Iterator[ElementTree.Element]:
    """Each PubmedArticle and DeleteCitation of a file, valid until the next is asked for."""
    try:
        with _open(path) as file:
            _refuse_entities(file, path)
            file.seek(0)
            yield from _elements(file, path)
    except InvalidArgument:
        raise
    except _UNREADABLE as error:
        refuse(_FLAG, str(path), f"damaged or cut short ({type(error).__name__}); fetch the file again")


def _open(path: Path) -> BufferedIOBase:
    """The file's bytes, unpacked."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _elements(file: BufferedIOBase, path: Path) -> Iterator[ElementTree.Element]:
    """Parse a file, forgetting each citation (and the root's hold on it) once it was handed out."""
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
    """The first element has begun: no declaration can follow."""


def _refuse_entities(file: BufferedIOBase, path: Path) -> None:
    """Entities can blow a small file up to gigabytes. NLM's files name a DTD (not fetched) but declare no entity."""

    def declared(*_: object) -> None:
        refuse(_FLAG, str(path), "declares XML entities, which NLM's files never do; fetch it from NLM")

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
    """The paper's own number (a citation also holds those of papers it comments on, deeper down)."""
    pmid = (article.findtext("MedlineCitation/PMID") or "").strip()
    if not pmid:
        refuse(_FLAG, str(path), "has a citation without PMID, so papers cannot be told apart; fetch the file again")
    return pmid


def _abstract(article: ElementTree.Element) -> str:
    """The English abstract as one paragraph, its parts after their labels; "" without one. Markup is flattened."""
    parts = []
    for part in article.iterfind("MedlineCitation/Article/Abstract/AbstractText"):
        text = " ".join("".join(part.itertext()).split())
        label = part.get("Label", "").strip()
        if text:
            parts.append(f"{label}: {text}" if label and label != "UNLABELLED" else text)
    return " ".join(parts)


def _pubmed_day(article: ElementTree.Element) -> date | None:
    """The day on which PubMed took the paper in; None if the record does not tell, which leaves it out."""
    for status in _DATE_STATUSES:
        found = article.find(f"PubmedData/History/PubMedPubDate[@PubStatus='{status}']")
        if found is not None:
            try:
                return date(*(int(found.findtext(part) or "") for part in ("Year", "Month", "Day")))
            except ValueError:
                continue
    return None
