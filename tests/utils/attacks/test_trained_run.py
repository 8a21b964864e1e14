"""A run's rows and models are found again from its folder; what cannot be is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dptune._validate import InvalidArgument
from dptune.lora import adapters
from tests.attacked_runs import PIN, SECRET, texts, train_run, write_rows
from tests.tiny import save_tiny
from utils.attacks.trained_run import (
    TrainedRun,
    encode_rows,
    find_rows,
    find_run,
    models,
    prompt_of,
    recorded_fingerprint,
    times_in,
    was_cut,
)

NAMES = ["ann", "bob", "eve", "ann", "", "bob"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private adapter for authors; held-out rows of one of them, of a stranger, and of a training row."""
    folder = tmp_path_factory.mktemp("authors")
    rows = texts(1, 6)
    train = write_rows(folder / "train.jsonl", rows, NAMES)
    held_out = write_rows(folder / "held_out.jsonl", [*texts(2, 5), rows[0]], ["ann", "zoe", "", "yan", "zoe", "kim"])
    private = ("--clip_norm", 1, "--noise_multiplier", 1, "--delta", 1e-2, "--lora_r", 2, "--learning_rate", 1e-1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dptune.report.publish._plot_curve", "utils.training.outputs.plot_diagnostics"):
            patch.setattr(name, lambda path, *_, **__: path.touch() or True)
        train_run(
            folder, train, held_out, *private, "--privacy_unit", "author", "--examples_per_unit", 2,
            "--per_device_train_batch_size", 4,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> TrainedRun:
    return find_run(str(folder / "run"))


def test_the_run_tells_its_guarantee(run: TrainedRun) -> None:
    assert run.statement.guarantee == "dp"
    assert run.profile[0] == (run.statement.epsilon, 1e-2)
    deltas = [delta for _, delta in run.profile]
    assert min(deltas) == 1e-2
    assert len(deltas) > 3
    assert run.unit.column == "author"


def test_rows_of_training_authors_are_no_held_out_rows(run: TrainedRun) -> None:
    rows = find_rows(run)
    assert rows.members.tolist() == list(range(6))
    assert rows.others.tolist() == [1, 2, 3, 4], "row 0 is ann's, and row 5 was trained on"
    assert rows.known == 2
    assert rows.authors is not None
    assert rows.authors[0] == ["ann", "bob", "eve", "ann", None, "bob"]
    assert rows.authors[1][:3] == ["ann", "zoe", None]


def test_the_start_is_the_base_and_the_end_is_the_adapter(run: TrainedRun) -> None:
    ids, found = torch.tensor([[1, 5, 9]]), []
    for model in models(run, torch.device("cpu")):
        with torch.no_grad():
            found.append((len(list(adapters(model))), model(ids).logits))
    assert found[0][0] == 0
    assert found[1][0] > 0
    assert not torch.equal(found[0][1], found[1][1])


def test_rows_in_memory_become_the_rows_of_the_training(run: TrainedRun) -> None:
    rows = find_rows(run)
    again = encode_rows(run, [{"text": text} for text in [*texts(1, 6), PIN.format(SECRET)]], "--secrets", "s")
    assert [times_in(rows.train, again, row) for row in range(7)] == [1] * 6 + [0]
    for row in range(6):
        spans = [slice(one.starts[row], one.starts[row + 1]) for one in (again, rows.train)]
        assert np.array_equal(again.ids[spans[0]], rows.train.ids[spans[1]])
    assert prompt_of(again, 0) == (run.tokenizer.bos_token_id,)
    long = encode_rows(run, [{"text": "a b " * 40}, {"text": "a"}], "--secrets", "s")
    assert [was_cut(long, row, run.tokenizer.eos_token_id) for row in (0, 1)] == [True, False]


def test_changed_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    run = str(folder / "run")
    assert recorded_fingerprint(folder / "run") is not None
    fewer = write_rows(tmp_path / "fewer.jsonl", texts(1, 4), NAMES[:2] * 2)
    with pytest.raises(InvalidArgument, match="there are 2 authors, and the run had 4"):
        find_rows(find_run(run, train_file=[str(fewer)]))
    others = write_rows(tmp_path / "others.jsonl", texts(3, 6), NAMES)
    with pytest.raises(InvalidArgument, match="their fingerprint differs"):
        find_rows(find_run(run, train_file=[str(others)]))


def test_held_out_rows_that_were_trained_on_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="there are 0 held-out rows with something to learn; 6 are training"):
        find_rows(find_run(str(folder / "run"), held_out_file=[str(folder / "train.jsonl")]))


def test_rows_are_needed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder / "run", copy)
    settings = copy / "config.yaml"
    kept = [line for line in settings.read_text().splitlines() if not line.startswith("validation_file")]
    settings.write_text("\n".join(kept) + "\n")
    with pytest.raises(InvalidArgument, match="--held_out_file=None: the run had no held-out rows"):
        find_rows(find_run(str(copy)))
    (folder / "moved.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    again = find_run(
        str(copy), train_file=[str(folder / "moved.jsonl")], held_out_file=[str(folder / "held_out.jsonl")]
    )
    assert len(find_rows(again).others) == 4, "moved files are named by flags"


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="holds no finished run"):
        find_run(str(tmp_path))
    save_tiny(tmp_path / "publish")
    (tmp_path / "config.yaml").write_text("tasks: [sst2]\n")
    with pytest.raises(InvalidArgument, match=r"was not trained by train_clm\.py"):
        find_run(str(tmp_path))


def test_a_damaged_checkpoint_tells_no_fingerprint(tmp_path: Path) -> None:
    assert recorded_fingerprint(tmp_path) is None
    for name, text in (("checkpoint-1", "{"), ("checkpoint-2", json.dumps({"identity": {"training_data": "ab"}}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(text)
    assert recorded_fingerprint(tmp_path) == "ab"
