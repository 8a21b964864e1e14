"""The function that the training script calls: which data, which validation set, and the shipped example file."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from dptune._validate import InvalidArgument
from dptune.sampling import Parts
from dptune.units.unit import EXAMPLE_LEVEL, PrivacyUnit
from tests.processes import run_processes
from tests.tiny import tiny_tokenizer
from utils.cli.machines import machine_of
from utils.data import encode_rows, make_rows, tokenization, workers
from utils.data.load import load_training_data
from utils.data.named_sets import DATA_DIR
from utils.data.tokenization import TokenizedDataset
from utils.data.workers import in_order

TOKENIZER = tiny_tokenizer()


def load(**given: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """`load_training_data` with these arguments and no others."""
    settings: dict[str, Any] = {
        "dataset_name": None,
        "train_file": None,
        "validation_file": None,
        "prompt_style": "plain",
        "tokenizer": TOKENIZER,
        "block_size": 64,
    }
    return load_training_data(**{**settings, **given})


def write_jsonl(path: Path, *rows: dict[str, str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(answer: str) -> dict[str, str]:
    return {"instruction": "Say it.", "answer": answer}


def text(data: TokenizedDataset, index: int = 0) -> str:
    return TOKENIZER.decode(data.batch([index], 0)["input_ids"][0])


def test_file_with_and_without_validation_file(tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "t.jsonl", pair("yes"), pair("no"))
    train, validation = load(train_file=train_file)
    assert (len(train), text(train), validation) == (2, "Say it.\nyes</s>", None)
    _, validation = load(train_file=train_file, validation_file=write_jsonl(tmp_path / "v.jsonl", pair("maybe")))
    assert validation is not None
    assert (len(validation), text(validation)) == (1, "Say it.\nmaybe</s>")


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_saved_dataset_brings_its_own_validation_split(tmp_path: Path, name: str) -> None:
    splits = {"train": [pair("yes")], name: [pair("no"), pair("so")], "test": [pair("x")]}
    folder = str(tmp_path / "saved")
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder)
    train, validation = load(train_file=folder)
    assert validation is not None
    assert (text(train), len(validation), text(validation)) == ("Say it.\nyes</s>", 2, "Say it.\nno</s>")
    _, validation = load(train_file=folder, validation_file=write_jsonl(tmp_path / "v.jsonl", pair("maybe")))
    assert validation is not None
    assert text(validation) == "Say it.\nmaybe</s>"


def test_an_error_in_the_validation_file_names_its_flag(tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "t.jsonl", pair("yes"))
    with pytest.raises(InvalidArgument, match=r"--validation_file=.*no such file"):
        load(train_file=train_file, validation_file=str(tmp_path / "none.jsonl"))


def test_users_that_nobody_thought_of_are_refused_in_the_training_file_alone(tmp_path: Path) -> None:
    with_users = write_jsonl(tmp_path / "t.jsonl", pair("yes"), pair("no") | {"email": "ann@example.org"})
    told = "--train_file=.*names users in email; give --privacy_unit email, or --ignore_users"
    with pytest.raises(InvalidArgument, match=told) as caught:
        load(train_file=with_users, users_flag="--privacy_unit")
    assert "ann@" not in str(caught.value)
    assert len(load(train_file=with_users)[0]) == 2
    plain = write_jsonl(tmp_path / "p.jsonl", pair("yes"))
    assert load(train_file=plain, validation_file=with_users, users_flag="--privacy_unit")[1] is not None


@pytest.mark.parametrize("given", [{}, {"dataset_name": "pubmed_generation", "train_file": "x.json"}])
def test_exactly_one_source(given: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="exactly one of --train_file and --dataset_name"):
        load(**given)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InvalidArgument, match=r"--dataset_name='wikitext': give one of pubmed_generation"):
        load(dataset_name="wikitext")


def test_pubmed_is_abstracts_after_their_prompt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pubmed" / "a.jsonl", {"abstract": "The patients"}, {"abstract": "We report"})
    train, validation = load(dataset_name="pubmed_generation", data_dir=tmp_path)
    assert [text(train, i) for i in range(2)] == ["Abstract: The patients</s>", "Abstract: We report</s>"]
    labels = train.batch([0], 0)["labels"][0]
    assert TOKENIZER.decode(labels[labels != -100]) == " The patients</s>"
    assert validation is None
    write_jsonl(tmp_path / "pubmed" / "validation.jsonl", {"abstract": "A disease"})
    train, validation = load(dataset_name="pubmed_generation", data_dir=tmp_path)
    assert validation is not None
    assert (len(train), len(validation), text(validation)) == (2, 1, "Abstract: A disease</s>")


def test_pubmed_dates_are_passed_on(tmp_path: Path) -> None:
    rows = [{"abstract": f"Day {day}", "date": f"2024-01-0{day}"} for day in (1, 2, 3)]
    write_jsonl(tmp_path / "pubmed" / "a.jsonl", *rows)
    known = {"dataset_name": "pubmed_generation", "data_dir": tmp_path}
    train, _ = load(**known, date_from="2024-01-02", date_to="2024-01-03")
    assert len(train) == 2
    with pytest.raises(InvalidArgument, match=r"--date_from='2024-13-02': give a day as YYYY-MM-DD"):
        load(**known, date_from="2024-13-02", date_to="2024-12-03")


def test_several_files_are_one_data_set_in_order(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "all.jsonl", pair("a"), pair("b"), pair("c"))
    parts = [
        write_jsonl(tmp_path / "parts" / f"{n}.jsonl", *rows)
        for n, rows in enumerate([[pair("a"), pair("b")], [pair("c")]])
    ]
    whole, _ = load(train_file=one)
    for given in (parts, str(tmp_path / "parts"), str(tmp_path / "parts" / "*.jsonl")):
        train, held_out = load(train_file=given, validation_file=given)
        assert held_out is not None
        assert train.fingerprint() == held_out.fingerprint() == whole.fingerprint()
    assert load(train_file=parts[::-1])[0].fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("flag", ["--train_file", "--validation_file"])
def test_a_mistake_in_one_of_several_files_names_it_and_its_row(tmp_path: Path, flag: str) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", pair("a"))
    bad = write_jsonl(tmp_path / "bad.jsonl", pair("a"), {"instruction": "Say it.", "reply": "secret"})
    given = {"train_file": good, flag.removeprefix("--"): [good, bad]}
    told = (
        rf"{flag}='.*bad\.jsonl': row 2 \(counted from 1\): answer is missing, although row 1 of .*good\.jsonl has it"
    )
    with pytest.raises(InvalidArgument, match=told) as caught:
        load(**given)
    assert "secret" not in str(caught.value)


def test_people_are_found_in_every_file(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "1.jsonl", pair("a") | {"who": "ann"}, pair("b") | {"who": "bob"})
    second = write_jsonl(tmp_path / "2.jsonl", pair("c") | {"who": "ann"})
    for unit in (PrivacyUnit("who", examples=3), PrivacyUnit("who", EXAMPLE_LEVEL, examples=3)):
        authors = load(train_file=[first, second], unit=unit)[0].authors
        assert authors is not None
        assert authors.of_row.tolist() == [0, 1, 0]
    named = write_jsonl(tmp_path / "3.jsonl", pair("c") | {"email": "secret"})
    with pytest.raises(InvalidArgument, match=r"3\.jsonl': names users in email; give --privacy_unit email"):
        load(train_file=[write_jsonl(tmp_path / "4.jsonl", pair("a")), named], users_flag="--privacy_unit")


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_jsonl(tmp_path / "t.jsonl", pair("yes"))
    bad = write_jsonl(tmp_path / "b.jsonl", pair("yes"), {"instruction": "x"})
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = sorted(tmp_path.rglob("*"))
    for run_folder in (tmp_path / "run", None):
        train, _ = load(train_file=rows, validation_file=rows, run_folder=run_folder)
        assert text(train) == "Say it.\nyes</s>"
        with pytest.raises(InvalidArgument):
            load(train_file=rows, validation_file=bad, run_folder=run_folder)
        assert sorted(tmp_path.rglob("*")) == before


def test_leftovers_of_a_crashed_run_are_cleared(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "t.jsonl", pair("yes"))
    for number in (0, 8):
        write_jsonl(tmp_path / "run" / f".rows-{number}" / "train.ids", pair("private"))
    load(train_file=rows, run_folder=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_data_cache_skips_the_work_and_knows_other_data_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_jsonl(tmp_path / "t.jsonl", *(pair("yes") | {"who": f"{n % 2}"} for n in range(4)))
    given: dict[str, Any] = {"train_file": rows, "data_cache": str(tmp_path / "cache"), "run_folder": tmp_path / "run"}
    given |= {"unit": PrivacyUnit("who", EXAMPLE_LEVEL, examples=1), "users_flag": None}
    made, _ = load(**given)
    others: dict[str, dict[str, Any]] = {
        "--block_size": {"block_size": 8},
        "--prompt_style": {"prompt_style": "chat"},
        "--examples_per_unit": {"unit": PrivacyUnit("who", EXAMPLE_LEVEL, examples=2)},
        "--privacy_unit": {"unit": PrivacyUnit()},
        "--seed": {"seed": 1},
        "validation data": {"validation_file": rows},
        "tokenizer": {"tokenizer": special_tokenizer()},
        "template_date": {"day": "2026-01-31"},
        "--ignore_users": {"users_flag": "--privacy_unit"},
    }
    monkeypatch.setattr(make_rows, "in_order", lambda *_: pytest.fail("the rows are tokenised again"))
    found, _ = load(**given)
    assert found.fingerprint() == made.fingerprint()
    assert found.authors is not None
    assert made.authors is not None
    assert (found.num_cut, len(found.authors), found.authors.num_left_out) == (made.num_cut, 2, 2)
    for name, change in others.items():
        with pytest.raises(InvalidArgument, match=rf"--data_cache=.*made with another .*{name}"):
            load(**given | change)
    write_jsonl(tmp_path / "t.jsonl", pair("no") | {"who": "1"})
    with pytest.raises(InvalidArgument, match="made with another training data; give another folder, or remove this"):
        load(**given)


def special_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    return tokenizer


def test_worker_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, authors, the date and the numbers of bad rows are the same with two workers as in one process."""
    rows = [{"instruction": f"Say {n}.", "answer": "word " * (n % 7), "who": f"{n % 13}"} for n in range(70)]
    path = write_jsonl(tmp_path / "t.jsonl", *rows)
    bad = write_jsonl(tmp_path / "b.jsonl", *rows, {"instruction": "x", "answer": 7, "who": "1"})  # type: ignore[dict-item]
    monkeypatch.setattr(encode_rows, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(workers, "_ALONE_FIRST", 1)
    telling = tiny_tokenizer()
    telling.chat_template = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
    given: dict[str, Any] = {"tokenizer": telling, "prompt_style": "chat", "day": "2026-01-31"}
    given |= {"unit": PrivacyUnit("who", EXAMPLE_LEVEL, examples=2)}
    found = []
    for count in (1, 2):
        monkeypatch.setattr(make_rows, "num_processors", lambda count=count: count)
        found.append(load(train_file=path, **given)[0])
        with pytest.raises(InvalidArgument, match=r"row 71 \(counted from 1\): answer is not text \(int\)"):
            load(train_file=bad, **given)
    assert found[0].fingerprint() == found[1].fingerprint()
    assert len(found[0]) == 26
    assert text(found[1]).startswith("31 Jan 2026")


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that Python and numpy allocate until the run begins; its steps then need the lengths, 8 bytes a row."""
    monkeypatch.setattr(make_rows, "num_processors", lambda: 1)
    monkeypatch.setattr(encode_rows, "_ROWS_AT_ONCE", 200)
    monkeypatch.setattr(workers, "_ALONE_FIRST", 1)
    monkeypatch.setattr(tokenization, "_BLOCK", 1 << 12)
    monkeypatch.setattr(tokenization, "_BLOCK_ROWS", 1 << 8)
    peaks = []
    load(train_file=write_jsonl(tmp_path / "first.jsonl", *(pair("word " * 12) for _ in range(1_000))))
    for count in (5_000, 11_000):
        path = write_jsonl(tmp_path / f"{count}.jsonl", *(pair("word " * 12) for _ in range(count)))
        tracemalloc.start()
        try:
            data, _ = load(train_file=path)
            assert (len(data), data.num_without_answer, len(data.ids_until(1 << 20))) == (count, 0, 0)
            data.fingerprint()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 28 * 6_000  # the smallest object, without what holds it


def _load_on(rank: int, gather: Any, folder: Path, name: str) -> tuple[str, int]:  # noqa: ARG001
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=rank, local_process_index=rank)
    machine = machine_of(accelerator)
    tokenised = []
    make_rows.in_order = lambda *given: tokenised.append(1) or in_order(*given)  # type: ignore[assignment]
    try:
        data, held_out = load(
            train_file=str(folder / name),
            validation_file=str(folder / "t.jsonl"),
            run_folder=folder / "run",
            machine=machine,
        )
    except InvalidArgument as error:
        return str(error), len(tokenised)
    assert held_out is not None
    return data.fingerprint() + held_out.fingerprint(), len(tokenised)


def test_two_ranks_of_a_machine_share_what_one_makes(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", pair("yes"), pair("no"))
    write_jsonl(tmp_path / "b.jsonl", pair("yes"), {"instruction": "x"})
    alone, _ = load(train_file=train)
    assert run_processes(2, _load_on, tmp_path, "t.jsonl") == [
        (alone.fingerprint() * 2, 2),
        (alone.fingerprint() * 2, 0),
    ]
    (one, _), (other, worked) = run_processes(2, _load_on, tmp_path, "b.jsonl")
    assert one == other
    assert "row 2 (counted from 1): answer is missing" in one
    assert not worked
    assert not (tmp_path / "run").exists()


def test_the_shipped_example_file_loads() -> None:
    train, _ = load(train_file=str(DATA_DIR / "example_instructions.json"), block_size=256)
    assert len(train) == 24
    assert train.num_cut == train.num_without_answer == 0
    assert len({text(train, i) for i in range(24)}) == 24


def test_weights_are_those_of_the_values_of_the_flag(tmp_path: Path) -> None:
    """A folder and a pattern are one part each, whatever number of files they hold; the rows stay as they are."""
    for name, count in (("one/a", 3), ("one/b", 4), ("c1", 1), ("c2", 2), ("d", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", *(pair(f"{name} {n}") for n in range(count)))
    files = [str(tmp_path / "one"), str(tmp_path / "c*.jsonl"), str(tmp_path / "d.jsonl")]
    train, _ = load(train_file=files, train_file_weights=[1, 2.5, 3])
    assert train.parts == Parts((7, 3, 5), (1, 2.5, 3))
    plain, _ = load(train_file=files)
    assert plain.parts is None
    assert plain.fingerprint() == train.fingerprint()
    assert len(train) == sum(train.parts.sizes)


def test_weights_are_found_in_a_cache_too(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", *(pair("x") for _ in range(n))) for n in (2, 3)]
    how: dict[str, Any] = {"data_cache": str(tmp_path / "cache"), "run_folder": tmp_path / "run", "train_file": files}
    assert load(**how)[0].parts is None
    (tmp_path / "run").mkdir(exist_ok=True)
    assert load(**how, train_file_weights=[1, 2])[0].parts == Parts((2, 3), (1, 2))
