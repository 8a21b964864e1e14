"""scripts/predict.py on classifiers that train_classifier.py trained: every mode predicts what the run measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import predict
from tests.classifier_folders import BAD, GOOD, save_bert, save_llama
from tests.tiny import save_tiny
from train_classifier import main as train
from utils.classification.mode_defaults import MODES

pytestmark = pytest.mark.usefixtures("no_plots")

MOODS = {word: "sunny" if word in GOOD else "grim" for word in (*GOOD, *BAD)}


def rows_of(count: int) -> list[dict[str, str]]:
    """Texts of several lengths with their class."""
    words = [*GOOD, *BAD]
    return [
        {"opinion": " ".join(["the film was", *["very"] * (at % 4), words[at % 6]]), "mood": MOODS[words[at % 6]]}
        for at in range(count)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write(folder / "train.jsonl", rows_of(40))
    write(folder / "held_out.jsonl", rows_of(17))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "bert": save_bert(tmp_path_factory.mktemp("bert"), initializer_range=0.4),
        "llama": save_llama(tmp_path_factory.mktemp("llama")),
    }


def train_on(files: Path, checkpoint: Path, out: Path, mode: str, *more: str) -> Path:
    """The folder of a short run without privacy."""
    words = ["--model_checkpoint", checkpoint, "--train_file", files / "train.jsonl", "--output_dir", out]
    words += ["--validation_file", files / "held_out.jsonl", "--text_columns", "opinion", "--label_column", "mood"]
    words += ["--finetune_mode", mode, "--max_length", 16, "--batch_size", 20, "--epochs", 2, "--lora_r", 2]
    train([str(word) for word in [*words, "--num_prepend_tokens", 3, "--learning_rate", 1e-2, *more]])
    return out / "train"


def line(run: Path, files: Path, output: Path) -> list[str]:
    words = ["--model_path", run, "--input_file", files / "held_out.jsonl", "--output_file", output]
    return [str(word) for word in [*words, "--text_columns", "opinion", "--batch_size", 4]]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("mode", "name", "more"),
    [
        *((mode, "bert", ()) for mode in MODES),
        ("soft-prompt", "llama", ()),
        ("prefix+lora", "llama", ()),
        ("last-layer", "llama", ("--label_words", "bad", "good", "--prompt_suffix", " this film was")),
        ("ia3", "llama", ("--prompt_suffix", " this film was")),
    ],
)
def test_predictions_score_what_the_run_measured(
    mode: str, name: str, more: tuple[str, ...], files: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    run = train_on(files, checkpoints[name], tmp_path, mode, *more)
    predict.main(line(run, files, tmp_path / "found.jsonl"))
    found, held_out = read(tmp_path / "found.jsonl"), rows_of(17)
    assert len(found) == 17
    for row in found:
        assert list(row["probabilities"]) == ["grim", "sunny"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["class_name"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["label"] == ["grim", "sunny"].index(row["class_name"])
    right = sum(row["class_name"] == given["mood"] for row, given in zip(found, held_out, strict=True)) / 17
    scores = json.loads((run / "results.json").read_text())["scores"]["validation"]
    assert right == pytest.approx(scores["accuracy"])


@pytest.fixture(scope="module")
def prompted(files: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose files belong to its checkpoint."""
    return train_on(files, checkpoints["bert"], tmp_path_factory.mktemp("prompted"), "soft-prompt")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        predict.main(words)
    assert ended.value.code == 2
    *_, told = capsys.readouterr().err.splitlines()  # behind the bars of loading
    assert told.startswith("error: ")
    return told


def test_what_is_no_classifier_is_refused_and_nothing_is_written(
    files: Path, prompted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.jsonl"
    capsys.readouterr()
    assert "holds LlamaForCausalLM, not a classifier" in refused(
        line(save_tiny(tmp_path / "tiny"), files, output), capsys
    )
    assert "--model_path=" in (told := refused(line(files, files, output), capsys))
    assert "holds no classifier" in told
    assert "it holds the runs of train" in refused(line(prompted.parent, files, output), capsys)
    pairs = [*line(prompted, files, output), "--text_columns", "opinion", "mood"]
    pairs.remove("--text_columns")
    pairs.remove("opinion")
    told = "--text_columns=2: the classifier was trained on 1 text per row; name as many columns"
    assert told in refused(pairs, capsys)
    assert not output.exists()


def test_an_adapter_needs_its_checkpoint_and_its_classes(
    files: Path, prompted: Path, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (prompted / "publish").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    output = tmp_path / "found.jsonl"
    capsys.readouterr()
    assert "--model_name_or_path='./gone': no model could be loaded" in refused(line(moved, files, output), capsys)
    given = [*line(moved, files, output), "--model_name_or_path"]
    assert "--model_path=" in refused([*given, str(checkpoints["llama"])], capsys)
    predict.main([*given, str(checkpoints["bert"])])
    predict.main(line(prompted, files, tmp_path / "same.jsonl"))
    assert read(output) == read(tmp_path / "same.jsonl")
    (moved / "dptune_settings.json").unlink()
    capsys.readouterr()
    assert "nothing there names the classes" in refused([*given, str(checkpoints["bert"])], capsys)


def test_mistakes_in_flags_are_one_line(
    files: Path, prompted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.jsonl"
    words = line(prompted, files, output)
    capsys.readouterr()
    assert "--output_file='found.csv': give a name that ends in .jsonl" in refused(
        [*words, "--output_file", "found.csv"], capsys
    )
    source = str(files / "held_out.jsonl")
    assert "is the input file too" in refused([*words, "--output_file", source], capsys)
    assert "its folder does not exist" in refused([*words, "--output_file", str(tmp_path / "no" / "x.jsonl")], capsys)
    assert "--text_columns='gone': no such column" in refused([*words, "--text_columns", "gone"], capsys)
    assert "--block_size=62: the model's context is 64 tokens for text and 3 virtual tokens" in refused(
        [*words, "--block_size", "62"], capsys
    )
    assert not output.exists()
