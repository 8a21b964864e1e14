"""train_clm.py and train_classifier.py with --views and --token_dropout: epsilon, report, card, resuming, refusals."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_classifier
import train_clm
from tests.classifier_folders import save_bert, write_sst2
from tests.faults import write_examples
from tests.scripts import test_train_classifier
from tests.scripts.test_resume import refused, report_of, signal_in_step, weights_of
from tests.scripts.test_train_clm import REPORT_KEYS, flags
from utils.training.log import read_diagnostics

pytestmark = pytest.mark.usefixtures("no_plots")

VIEWS: dict[str, Any] = {"views": 3, "token_dropout": 0.2}
SETTINGS: dict[str, Any] = {"num_train_epochs": None, "max_train_steps": 4, "checkpointing_steps": 2}
TOLD = "; an example's gradient is the mean over 3 views of it"
Line = Callable[..., list[str]]


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "data.json")


@pytest.fixture
def line(tiny_model_dir: Path, train_file: Path, tmp_path: Path) -> Line:
    def make(**changes: object) -> list[str]:
        out = Path(str(changes.pop("out", tmp_path / "run")))
        return flags(tiny_model_dir, train_file, out, **SETTINGS | VIEWS | changes)

    return make


def tokens_of(out: Path) -> list[tuple[int, int]]:
    rows = read_diagnostics(out / "diagnostics.jsonl")[1:]
    return [(row["batch_drawn"], row["tokens"]) for row in rows]


def card_of(folder: Path) -> str:
    """The card in one line, without the ends of lines in its command."""
    return " ".join((folder / "README.md").read_text().replace("\\", " ").split())


def test_plan_report_and_ledger_differ_in_the_views_alone(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"insecure_test_seed": 4}
    train_clm.main(line(**how))
    shown = capsys.readouterr().out
    train_clm.main(line(**how, views=None, token_dropout=None, out=tmp_path / "plain"))
    views, plain = report_of(tmp_path / "run"), report_of(tmp_path / "plain")
    assert set(views) == REPORT_KEYS
    assert views.pop("method") == f"{plain.pop('method')}{TOLD}"
    assert views == plain
    assert (tmp_path / "run" / "ledger.jsonl").read_text() == (tmp_path / "plain" / "ledger.jsonl").read_text()
    assert TOLD in shown
    assert tokens_of(tmp_path / "run") == [(drawn, 3 * tokens) for drawn, tokens in tokens_of(tmp_path / "plain")]


def test_the_card_states_the_views_and_neither_epsilon_nor_the_held_out_loss_depends_on_them(
    line: Line, train_file: Path, tmp_path: Path
) -> None:
    how = {"max_train_steps": 1, "validation_file": train_file}
    train_clm.main(line(**how))
    train_clm.main(line(**how, views=None, token_dropout=None, out=tmp_path / "plain"))
    views, plain = (report_of(tmp_path / name) for name in ("run", "plain"))
    assert (views["guarantee"], views["epsilon"]) == ("dp", plain["epsilon"])
    before = [read_diagnostics(tmp_path / name / "diagnostics.jsonl")[0] for name in ("run", "plain")]
    assert before[0] == before[1]
    assert "eval_loss" in before[0]
    card = card_of(tmp_path / "run" / "publish")
    assert TOLD in card
    assert "--views 3 --token_dropout 0.2" in card
    assert "views" not in card_of(tmp_path / "plain" / "publish")


def test_with_repeatable_randomness_a_stopped_run_ends_as_one_that_was_not(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"insecure_test_seed": 4, "lora_dropout": 0.1}
    train_clm.main(line(**how, out=tmp_path / "calm"))
    with monkeypatch.context() as patch:
        signal_in_step(patch, 3, signal.SIGTERM)
        train_clm.main(line(**how))
    train_clm.main(line(**how, resume_from_checkpoint="latest"))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_resumes_with_the_same_views_only(line: Line, capsys: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(patch, 2, signal.SIGTERM)
        train_clm.main(line())
    again = {"resume_from_checkpoint": "latest"}
    assert "views was 3 in the checkpoint and is 2 now" in refused(line(**again, views=2), capsys)
    assert "views was 3 in the checkpoint and is 1 now" in refused(line(**again, views=None), capsys)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"token_dropout": None}, "--views=3: the model has no dropout, so all views would be the same; give --token"),
        ({"views": 0}, "--views=0: give a whole number of at least 1"),
        ({"token_dropout": 1}, "--token_dropout=1.0: give a number of at least 0 and below 1"),
    ],
)
@pytest.mark.parametrize("dry_run", [None, True])
def test_a_mistake_is_one_line(
    changes: dict[str, Any], told: str, dry_run: bool | None, line: Line, tmp_path: Path, capsys: Any
) -> None:
    assert told in refused(line(**changes, dry_run=dry_run), capsys)
    assert not (tmp_path / "run").exists()


def test_authors_have_views_and_runs_without_privacy_too(line: Line, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    users = [f"u{number % 9}" for number in range(40)]
    rows = [{"instruction": "Repeat it.", "answer": "word " * len(user), "user": user} for user in users]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    authors = {"train_file": data, "privacy_unit": "user", "examples_per_unit": 2, "unit_gradient": "sum"}
    how = {**authors, "gradient_accumulation_steps": 1, "delta": 1e-2, "max_train_steps": 2}
    train_clm.main(line(**how))
    assert str(report_of(tmp_path / "run")["method"]).endswith(f"is clipped{TOLD}")
    train_clm.main(line(**how | {"clip_norm": -1, "noise_multiplier": -1, "delta": None}, out=tmp_path / "plain"))
    assert report_of(tmp_path / "plain")["guarantee"] == "none"


# --- classifiers ---


@pytest.fixture(scope="module")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("glue"))


PRIVATE: dict[str, Any] = {"enable_dp": True, "noise_multiplier": 1, "clip_norm": 0.1, "views": 2}


def test_a_classifier_has_views(sst2: Path, tmp_path: Path) -> None:
    """BERT has dropout of its own."""
    bert = save_bert(tmp_path / "bert")
    train_classifier.main(test_train_classifier.flags(bert, sst2, tmp_path / "out", **PRIVATE))
    report = test_train_classifier.report_of(tmp_path / "out")
    assert report["method"].endswith("; an example's gradient is the mean over 2 views of it")
    assert [drawn > 0 for drawn, _ in tokens_of(tmp_path / "out" / "sst2")] == [True, True]
    card = card_of(tmp_path / "out" / "sst2" / "publish")
    assert "mean over 2 views of it" in card
    assert "--views 2" in card


def test_a_classifier_without_dropout_needs_token_dropout(sst2: Path, tmp_path: Path, capsys: Any) -> None:
    still = save_bert(tmp_path / "bert", **test_train_classifier.NO_DROPOUT)
    with pytest.raises(SystemExit) as stopped:
        train_classifier.main(test_train_classifier.flags(still, sst2, tmp_path / "out", **PRIVATE))
    assert stopped.value.code == 2
    assert "--views=2: the model has no dropout" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
