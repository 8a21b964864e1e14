"""PubMed files in NLM's structure: streaming, the range of days, one record per paper, damage."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from dptune._validate import InvalidArgument
from utils.data.pubmed import DayRange, abstract_files, stream_abstracts

WEEK = DayRange.parse()
HEAD = (
    '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January '
    '2023//EN" "https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_230101.dtd">\n<PubmedArticleSet>\n'
)
TAIL = "</PubmedArticleSet>\n"


def load_abstracts(folder: Path, days: DayRange, *, held_out: bool = False) -> list[str]:
    with TemporaryFile() as texts:
        return list(stream_abstracts(folder, days, texts, held_out=held_out))


def days(**by_status: str) -> str:
    """The history of a paper: received long before, then what is given as "Y-M-D"."""
    parts = []
    for status, iso in {"received": "2023-1-5", **by_status}.items():
        year, month, day = iso.split("-")
        inside = f"<Year>{year}</Year><Month>{month}</Month><Day>{day}</Day><Hour>6</Hour><Minute>42</Minute>"
        parts.append(f'<PubMedPubDate PubStatus="{status}">{inside}</PubMedPubDate>')
    return "".join(parts)


def article(pmid: int, abstract: str | None, history: str | None = None, version: int = 1) -> str:
    """One citation; `abstract` is the inside of <Abstract>, None for a paper without one."""
    inside = (
        "" if abstract is None else f"<Abstract>{abstract}<CopyrightInformation>c</CopyrightInformation></Abstract>"
    )
    history = days(pubmed="2023-8-3") if history is None else history
    return f"""<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM"><PMID Version="{version}">{pmid}</PMID>
<DateRevised><Year>2024</Year><Month>02</Month><Day>01</Day></DateRevised><Article PubModel="Print"><Journal>
<JournalIssue><PubDate><Year>2023</Year><Season>Summer</Season></PubDate></JournalIssue></Journal><ArticleTitle>T</ArticleTitle>{inside}
</Article><OtherAbstract Type="Publisher" Language="spa"><AbstractText>Resumen</AbstractText></OtherAbstract>
<CommentsCorrectionsList><CommentsCorrections RefType="CommentOn"><PMID Version="1">999</PMID></CommentsCorrections>
</CommentsCorrectionsList></MedlineCitation><PubmedData><History>{history}</History><ReferenceList><Reference>
<ArticleIdList><ArticleId IdType="pubmed">998</ArticleId></ArticleIdList></Reference></ReferenceList></PubmedData>
</PubmedArticle>
"""


def plain(text: str) -> str:
    return f"<AbstractText>{text}</AbstractText>"


def write(folder: Path, name: str, *citations: str, head: str = HEAD) -> Path:
    """A file of citations, packed if the name ends in .gz."""
    data = (head + "".join(citations) + TAIL).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


def test_structure_and_markup_become_one_paragraph(tmp_path: Path) -> None:
    parts = (
        '<AbstractText Label="METHODS" NlmCategory="METHODS">We gave\n 10<sup>3</sup> <i>E. <b>coli</b></i> &lt; '
        '5&#xb5;g.</AbstractText><AbstractText Label="UNLABELLED">So é.</AbstractText><AbstractText Label="EMPTY"/>'
        '<AbstractText Label="RESULTS">It <i>grew</i></AbstractText>'
    )
    write(tmp_path, "pubmed23n1.xml.gz", article(1, parts))
    assert load_abstracts(tmp_path, WEEK) == ["METHODS: We gave 103 E. coli < 5µg. So é. RESULTS: It grew"]


def test_only_the_days_wanted_and_only_papers_with_an_abstract(tmp_path: Path) -> None:
    histories = {
        "first day": days(pubmed="2023-8-1"),
        "last day": days(pubmed="2023-08-07"),
        "day before": days(pubmed="2023-7-31"),
        "day after": days(pubmed="2023-8-8"),
        "pubmed before entrez": days(entrez="2023-9-1", pubmed="2023-8-2"),
        "pubmed outside": days(entrez="2023-8-2", pubmed="2023-9-1"),
        "entrez alone": days(entrez="2023-8-2"),
        "bad pubmed day": days(pubmed="2023-2-30", entrez="2023-8-4"),
        "neither": days(medline="2023-8-2"),
        "no history": "",
    }
    citations = [article(n, plain(name), history) for n, (name, history) in enumerate(histories.items())]
    book = f"<BookDocument><PMID>77</PMID><Abstract>{plain('b')}</Abstract></BookDocument>"
    book = f"<PubmedBookArticle>{book}</PubmedBookArticle>"
    write(tmp_path, "pubmed23n1.xml", *citations, article(50, None), article(51, plain("  ")), book)
    expected = ["first day", "last day", "pubmed before entrez", "entrez alone", "bad pubmed day"]
    assert load_abstracts(tmp_path, WEEK) == expected


def test_a_paper_counts_once_and_its_last_revision_wins(tmp_path: Path) -> None:
    write(tmp_path, "pubmed23n2.xml.gz", article(1, plain("new")), article(3, plain("kept")))
    write(
        tmp_path, "pubmed23n1.xml", article(1, plain("old")), article(2, plain("a")), article(2, plain("b"), version=2)
    )
    assert sorted(load_abstracts(tmp_path, WEEK)) == ["b", "kept", "new"]


def test_deleted_and_withdrawn_papers_are_gone(tmp_path: Path) -> None:
    write(tmp_path, "pubmed23n1.xml", *(article(n, plain(f"paper {n}")) for n in range(1, 6)))
    deleted = '<DeleteCitation><PMID Version="1">1</PMID><PMID Version="1">2</PMID><PMID>12345</PMID></DeleteCitation>'
    moved = article(4, plain("moved"), days(pubmed="2024-1-1"))
    write(tmp_path, "pubmed23n2.xml", article(3, None), moved, deleted)
    write(tmp_path, "pubmed23n3.xml", article(2, plain("paper 2 again")))
    assert sorted(load_abstracts(tmp_path, WEEK)) == ["paper 2 again", "paper 5"]


@pytest.mark.parametrize("name", ["pubmed23n1.xml", "pubmed23n1.xml.gz"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path, name, *(article(n, plain(f"secret {n}")) for n in range(50)))
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": HEAD.encode() + b"\x00\xff" * 50, "empty": b""}[damage])
    with pytest.raises(InvalidArgument, match=r"^--dataset_name=.*pubmed23n1.*damaged or incomplete") as caught:
        load_abstracts(tmp_path, WEEK)
    assert "secret" not in str(caught.value)


def test_damage_inside_the_packed_stream_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, "pubmed23n1.xml.gz", *(article(n, plain(f"paper {n}")) for n in range(50)))
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # the checksum
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidArgument, match="damaged"):
        load_abstracts(tmp_path, WEEK)


@pytest.mark.parametrize(
    "entity", ['<!ENTITY lol "lol">', '<!ENTITY x SYSTEM "file:///etc/hostname">', '<!ENTITY % p "x">']
)
def test_entities_are_refused_before_anything_expands(tmp_path: Path, entity: str) -> None:
    write(tmp_path, "bad.xml", head=f"<!DOCTYPE PubmedArticleSet [{entity}]>\n<PubmedArticleSet>")
    with pytest.raises(InvalidArgument, match=r"bad\.xml.*entities"):
        load_abstracts(tmp_path, WEEK)


def test_other_xml_and_citations_without_a_number_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<feed><PubmedArticle/></feed>")
    with pytest.raises(InvalidArgument, match="not a PubMed file"):
        load_abstracts(tmp_path, WEEK)
    nameless = article(1, plain("a")).replace('<PMID Version="1">1</PMID>', "")  # but with PMIDs of others, deeper down
    assert "<PMID" in nameless
    write(tmp_path, "a.xml", nameless)
    with pytest.raises(InvalidArgument, match="without PMID"):
        load_abstracts(tmp_path, WEEK)


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    """250 citations of 20 kB outside the range: as a tree they take over 5 MB."""
    citation = article(1, plain("word " * 4000), days(pubmed="2020-1-1"))
    write(tmp_path, "pubmed23n1.xml", *[citation] * 250, article(2, plain("the one")))
    tracemalloc.start()
    try:
        assert load_abstracts(tmp_path, WEEK) == ["the one"]
        assert tracemalloc.get_traced_memory()[1] < 1.5e6
    finally:
        tracemalloc.stop()


def write_jsonl(path: Path, *rows: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_jsonl_rows_count_once_per_paper_and_by_date(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl",
        {"abstract": "no date"},
        {"text": "in range", "date": "2023-08-07"},
        {"text": "too late", "date": "2023-08-08"},
        {"abstract": "first version", "pmid": 5},
        {"abstract": "null date", "date": None},
        {"abstract": " "},
    )
    write_jsonl(tmp_path / "b.jsonl", {"abstract": "second version", "pmid": "5"}, {"abstract": "no date "})
    write_jsonl(tmp_path / "validation.jsonl", {"abstract": "held out"})
    assert sorted(load_abstracts(tmp_path, WEEK)) == ["in range", "no date", "null date", "second version"]
    assert load_abstracts(tmp_path, WEEK, held_out=True) == ["held out"]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"summary": "secret"}, "row 2 has the columns summary; name one of them abstract or text"),
        ({"abstract": None}, "row 2: abstract is not text"),
        ({"abstract": "secret", "date": "last week"}, "row 2: date is not YYYY-MM-DD"),
    ],
)
def test_bad_jsonl_rows_are_named(tmp_path: Path, row: dict[str, object], what: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"abstract": "fine"}, row)
    with pytest.raises(InvalidArgument, match=rf"--dataset_name=.*a\.jsonl.*{what}") as caught:
        load_abstracts(tmp_path, WEEK)
    assert "secret" not in str(caught.value)


def test_an_empty_folder_says_what_to_put_where(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidArgument) as caught:
            load_abstracts(folder, WEEK)
        for told in (str(folder), "pubmed*.xml.gz", "updatefiles", "2023-08-01 to 2023-08-07", '{"abstract": "..."}'):
            assert told in str(caught.value)
        assert abstract_files(folder, held_out=True) == []


def test_both_kinds_and_no_paper_in_range_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "pubmed23n1.xml", article(1, plain("a"), days(pubmed="2020-1-1")))
    with pytest.raises(InvalidArgument, match="no abstract from 2023-08-01 to 2023-08-07"):
        load_abstracts(tmp_path, WEEK)
    write_jsonl(tmp_path / "a.jsonl", {"abstract": "b"})
    with pytest.raises(InvalidArgument, match="XML and JSONL"):
        load_abstracts(tmp_path, WEEK)


def test_day_ranges() -> None:
    with pytest.raises(InvalidArgument, match=r"--date_to='7 August'"):
        DayRange.parse("2023-08-01", "7 August")
    with pytest.raises(InvalidArgument, match="later than --date_to"):
        DayRange.parse("2023-08-08", "2023-08-01")
