"""`python -m dptune.accounting`: its numbers equal the accountant's in every format, and a mistake prints one line."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dptune import InvalidArgument
from dptune.accounting import Cut, epsilon, noise_multiplier, planned_steps
from dptune.accounting import __main__ as tables

ROOT = Path(__file__).parents[3]
N, BATCHES, EPOCHS, DELTA = 67349, (256, 1024), (1.0, 3.0), 1e-6
FLAGS = ["--num_examples", "67349", "--batch_size", "256", "1024", "--epochs", "1", "3", "--delta", "1e-6"]


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    tables.main([*FLAGS, *flags])
    return capsys.readouterr().out


def cells_of(text: str) -> list[list[str]]:
    """The words of each line that begins with a batch size, in all formats except CSV."""
    lines = [re.findall(r"[^\s|]+", line) for line in text.splitlines()]
    return [words for words in lines if words and words[0].isdigit()]


def test_epsilon_by_batch_size_and_epochs_is_the_accountants_rounded_up(capsys: pytest.CaptureFixture[str]) -> None:
    rows = cells_of(printed(capsys, "--noise_multiplier", "0.9"))
    assert [row[0] for row in rows] == ["256", "1024"]
    for batch, row in zip(BATCHES, rows, strict=True):
        for epochs, shown in zip(EPOCHS, row[1:], strict=True):
            steps = -(-int(epochs) * N // batch)
            exact = epsilon(noise_multiplier=0.9, sampling_probability=batch / N, steps=steps, delta=DELTA)
            assert exact <= float(shown) <= exact * 1.001


def test_a_table_of_cut_draws_counts_the_cut(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch_size", "1024", "--epochs", "3", "--noise_multiplier", "1", "--max_batch", "1100"]
    text = printed(capsys, *flags)
    assert "67,349 examples, draws cut at 1,100\n" in text
    ((_, shown),) = cells_of(text)
    setting = {"noise_multiplier": 1.0, "sampling_probability": 1024 / N, "steps": 198, "delta": DELTA}
    exact = epsilon(**setting, cut=Cut(1100, N))
    assert exact <= float(shown) <= exact * 1.001
    assert exact > 1.5 * epsilon(**setting)


def test_a_table_with_noise_bands_counts_turns(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch_size", "1024", "--epochs", "3", "--noise_multiplier", "1", "--noise_bands", "8"]
    text = printed(capsys, *flags)
    assert "67,349 examples, 8 noise bands\n" in text
    ((_, shown),) = cells_of(text)
    exact = epsilon(noise_multiplier=1.0, sampling_probability=8 * 1024 / N, steps=25, delta=DELTA)
    assert exact <= float(shown) <= exact * 1.001


@pytest.mark.parametrize("group_size", [1, 3])
def test_the_noise_for_an_epsilon_is_the_accountants(capsys: pytest.CaptureFixture[str], group_size: int) -> None:
    """Cells of a one-row table, because cells with a group size take seconds."""
    text = printed(
        capsys, "--batch_size", "1024", "--target_epsilon", "4", "--group_size", str(group_size), "--format", "csv"
    )
    first, last = csv.DictReader(text.splitlines())
    assert [(int(cell["batch_size"]), float(cell["epochs"])) for cell in (first, last)] == [(1024, 1.0), (1024, 3.0)]
    assert [(int(cell["steps"]), float(cell["sampling_probability"])) for cell in (first, last)] == [
        (66, 1024 / N),
        (198, 1024 / N),
    ]
    expected = noise_multiplier(
        target_epsilon=4, delta=DELTA, sampling_probability=1024 / N, steps=66, group_size=group_size
    )
    assert float(first["noise_multiplier"]) == expected < float(last["noise_multiplier"])


def test_text_and_markdown_hold_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    text, markdown = (printed(capsys, "--noise_multiplier", "2", "--format", name) for name in ("text", "markdown"))
    assert cells_of(text) == cells_of(markdown)
    title, how, _, header, rule, *rows = markdown.splitlines()
    assert [title, how] == text.splitlines()[:2]
    assert title.startswith("epsilon at noise multiplier 2, delta 1e-06, 67,349 examples")
    assert (header, rule) == ("| batch size | 1 epoch | 3 epochs |", "| ---: | ---: | ---: |")
    assert len(rows) == 2
    assert len({len(line) for line in text.splitlines()[3:]}) == 1  # columns line up


def test_without_a_delta_the_default_one_is_taken_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num_examples", "2000", "--batch_size", "20", "--num_train_epochs", "1", "--noise_multiplier", "1"]
    tables.main(flags)
    title, *rest = capsys.readouterr().out.splitlines()
    assert "delta 1e-05: a tenth of 1 / 2,000 examples, rounded down" in title
    tables.main([*flags, "--delta", "1e-5"])
    assert capsys.readouterr().out.splitlines()[1:] == rest


@pytest.mark.parametrize("quantity", ["--noise_multiplier", "--target_epsilon"])
def test_the_title_names_the_accountants_that_answered(capsys: pytest.CaptureFixture[str], quantity: str) -> None:
    flags = ["--num_examples", "100", "--batch_size", "10", "100", "--epochs", "1", quantity, "2"]
    for delta, accountant in (("1e-6", "PLD"), ("1e-18", "RDP")):
        tables.main([*flags, "--delta", delta])
        how = capsys.readouterr().out.splitlines()[1]
        closed = "Gaussian mechanism in closed form (dp-accounting)"
        assert how == f"(add or remove one privacy unit; {closed}; {accountant} (dp-accounting))"


@pytest.mark.parametrize("form", ["text", "markdown", "csv"])
def test_a_cell_that_no_noise_reaches_leaves_the_others(capsys: pytest.CaptureFixture[str], form: str) -> None:
    """With hardly any noise, one step with a tiny probability costs less than 60; drawing all examples does not."""
    flags = ["--num_examples", "1000", "--batch_size", "1", "1000", "--epochs", "0.001", "--delta", "1e-6"]
    tables.main([*flags, "--target_epsilon", "60", "--format", form])
    text = capsys.readouterr().out
    assert ("out of reach" in text) == (form != "csv")
    small, large = (line for line in text.splitlines() if re.match(r"\|? *10*\b", line) and "epoch" not in line)
    assert re.search(r"-( \|)?$|,$", small)
    assert re.search(r"0\.\d+( \|)?$", large)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0"), (2.0, "2.000"), (2.00001, "2.001"), (0.012344, "0.01235"), (99.999, "100.00")],
)
def test_what_is_shown_is_never_below_the_bound(value: float | None, shown: str) -> None:
    assert tables._shown(tables.Cell(1, 1.0, 1, 0.1, value)) == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--batch_size", "70000", "--noise_multiplier", "1"],
            "--batch_size=70000: must be at most the 67349 examples",
        ),
        (["--delta", "0.1", "--noise_multiplier", "1"], "--delta=0.1: must be below 1/num_examples"),
        (["--epochs", "0", "--noise_multiplier", "1"], "--epochs=0.0: give a finite number above 0"),
        (["--noise_multiplier", "-1"], "--noise_multiplier=-1.0: give"),
        (["--noise_multiplier", "0.09"], "--noise_multiplier=0.09: protects nobody; give at least 0.1"),
        (
            ["--epochs", "1", "1e9", "--batch_size", "1000", "--noise_multiplier", "1"],
            "--epochs=1000000000.0: 67,349,000,000 steps with batches of 1000; the maximum is 1,000,000, so lower it",
        ),
        (["--target_epsilon", "inf"], "--target_epsilon=inf: give"),
        (["--group_size", "0", "--target_epsilon", "1"], "--group_size=0: give"),
        (["--max_batch", "0", "--target_epsilon", "1"], "--max_batch=0: give"),
        (["--max_batch", "512", "--target_epsilon", "1"], "--batch_size=1024: must be at most --max_batch, 512"),
        (
            ["--max_batch", "2000", "--group_size", "2", "--noise_multiplier", "1"],
            "--max_batch=2000: draws cannot be cut with a --group_size above 1",
        ),
        (["--noise_multiplier", "1", "--target_epsilon", "1"], "not allowed with argument"),
        ([], "one of the arguments --noise_multiplier --target_epsilon is required"),
        (["--noise", "1"], "one of the arguments"),
        (["--noise_multiplier", "1", "--format", "pdf"], "invalid choice: 'pdf'"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        tables.main([*FLAGS, *flags])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_steps_are_those_of_a_training_run() -> None:
    """Rounding can leave a quotient slightly above a whole number; it counts as that number."""
    assert planned_steps(num_examples=67349, expected_batch_size=256, epochs=3) == 790
    assert planned_steps(num_examples=1000, expected_batch_size=100, epochs=3) == 30
    assert planned_steps(num_examples=3, expected_batch_size=3, epochs=1e-6) == 1
    assert 1.1 * 100 / 10 > 11
    assert planned_steps(num_examples=100, expected_batch_size=10, epochs=1.1) == 11
    with pytest.raises(InvalidArgument, match=r"^epochs=1e\+308: an endless run; lower it"):
        planned_steps(num_examples=100, expected_batch_size=10, epochs=1e308)


def test_the_page_of_the_manual_is_what_the_program_prints() -> None:
    page = (ROOT / "docs" / "how_to" / "training.md").read_text()
    block = re.search(r"```\npython -m (dptune\.accounting .*?)\n\n(.*?)```", page, flags=re.DOTALL)
    assert block is not None
    command, output = block.groups()
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", *command.replace("\\\n", " ").split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert run.stdout == output
    assert time.monotonic() - started < 60  # 7 s on the author's machine, 3 s of them for torch
