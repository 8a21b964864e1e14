"""The comparison of synthetic with real text, run whole on small texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dptune._validate import InvalidArgument
from dptune.run.lock import LOCK_NAME, FolderLock
from scripts import evaluate_synthetic
from utils.cli.flags import exit_on_invalid_argument
from utils.synthetic import plots as synthetic_plots
from utils.synthetic import proxy_results
from utils.synthetic.arguments import HELD_OUT, REAL_TRAINING, UNTRAINED

MARK = "Zyzzyva"  # stands in every text, so that a quoted one is seen
EVIL = "<script>alert(1)</script>"
STEPS = ["--proxy_steps", "3", "--bootstrap", "10", "--passage_words", "8"]


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = [f"word{number}" for number in range(60)]
    return [f"{MARK} {EVIL} {' '.join(rng.choices(words, k=rng.randint(5, 20)))}." for _ in range(count)]


def write(path: Path, rows: list[str]) -> str:
    path.write_text("".join(json.dumps({"instruction": row, "id": f"r{n}"}) + "\n" for n, row in enumerate(rows)))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    train = texts(0, 100)
    rows = {"train": train, "held": texts(1, 100), "good": texts(2, 100), "memorised": train[:30] + texts(3, 70)}
    return {name: write(folder / f"{name}.jsonl", some) for name, some in rows.items()}


def line(files: dict[str, str], folder: Path, *flags: str) -> list[str]:
    synthetic = ["--synthetic_file", files["good"], files["memorised"], "--names", EVIL, "memorised"]
    return [*synthetic, "--held_out_file", files["held"], "--output_dir", str(folder), *STEPS, *flags]


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of a small run's time."""
    monkeypatch.setattr(synthetic_plots, "drawn_image", lambda *_, **__: "data:,")


@pytest.fixture(scope="module")
def output(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "new"
    evaluate_synthetic.main(line(files, folder, "--train_file", files["train"]))
    return folder


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def test_both_outputs_say_first_that_they_are_not_private(output: Path) -> None:
    assert next(iter(results(output))) == "not_private"
    assert results(output)["not_private"].startswith("Not private: computed on real rows")
    body = (output / "evaluation.html").read_text().partition("<body>")[2]
    assert body.strip().startswith('<p class="warning"><strong>Not private: computed on real rows')
    for kept in (output / "proxy_models").iterdir():
        assert next(iter(json.loads(kept.read_text()))) == "not_private"


def test_no_text_is_quoted_but_in_the_diagnostics_whose_first_line_forbids_publishing(output: Path) -> None:
    files = {path for path in output.rglob("*") if path.is_file()}
    quoting = {path.name for path in files if MARK.casefold() in path.read_text().casefold()}
    assert quoting == {"diagnostics_memorised.jsonl"}
    first, *rows = map(json.loads, (output / "diagnostics_memorised.jsonl").read_text().splitlines())
    assert "must not be published" in first["not_private"]
    assert {row["synthetic"] for row in rows if row["kind"] == "copy"} == {"memorised"}
    assert sum(row["kind"] == "copy" for row in rows) == 30


def test_names_are_escaped_on_the_page(output: Path) -> None:
    page = (output / "evaluation.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_every_statistic_is_there_for_every_column(output: Path) -> None:
    found = results(output)
    columns = [HELD_OUT, EVIL, "memorised"]
    assert list(found["divergence"]) == list(found["vocabulary"]["columns"]) == list(found["overlap"]) == columns
    assert list(found["proxy"]) == [EVIL, "memorised", REAL_TRAINING, UNTRAINED]
    assert list(found["lengths"]["words"]) == [*columns, "reference"]
    assert found["overlap"]["memorised"]["copies"] == 30
    assert found["overlap"][EVIL]["copies"] == 0
    assert found["overlap"]["memorised"]["passage"]["nearer"] > 0.6
    assert found["texts_a_column"] == 50
    assert found["settings"]["passage_words"] == 8


@pytest.mark.usefixtures("no_plots")
def test_the_same_line_again_trains_nothing_and_says_the_same(
    output: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (output / "evaluation.json").read_bytes()
    (output / "evaluation.json").unlink()
    monkeypatch.setattr(proxy_results, "make_model", pytest.fail)
    evaluate_synthetic.main(line(files, output, "--train_file", files["train"]))
    assert (output / "evaluation.json").read_bytes() == before


@pytest.mark.usefixtures("no_plots")
def test_without_training_rows_nothing_is_said_of_them_and_an_older_list_goes(
    tmp_path: Path, files: dict[str, str]
) -> None:
    (tmp_path / "diagnostics_memorised.jsonl").write_text("of an earlier run\n")
    evaluate_synthetic.main(line(files, tmp_path, "--proxy_model", "none"))
    assert not {"overlap", "proxy"} & results(tmp_path).keys()
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_NAME, "evaluation.json", "evaluation.html"}


def test_a_folder_in_which_another_program_works_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    with FolderLock() as other:
        other.take(tmp_path)
        with pytest.raises(InvalidArgument, match="another process is at work in it"):
            evaluate_synthetic.main(line(files, tmp_path, "--proxy_model", "none"))
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_NAME}


def test_a_mistake_is_one_line_without_a_word_of_the_rows(tmp_path: Path, files: dict[str, str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"instruction": {"secret": MARK}}) + "\n")
    with pytest.raises(InvalidArgument, match=r"--synthetic_file=.*row 1 .* is not text") as caught:
        evaluate_synthetic.main(
            ["--synthetic_file", str(bad), "--held_out_file", files["held"], "--output_dir", str(tmp_path)]
        )
    assert MARK not in str(caught.value)


def test_a_mistake_ends_the_program_with_status_2(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_invalid_argument():
        evaluate_synthetic.main(line(files, tmp_path, "--names", "one"))
    assert caught.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "there are 2 synthetic files; give one name for each" in said
