"""A study of trainings expands to its runs, continues where it was stopped, and compares equal seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import quality
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer
from utils.cli.flags import parse
from utils.training.arguments import CAUSAL_LM_GROUPS

ROOT = Path(__file__).parents[2]
STUDY = {
    "title": "Two",
    "about": "Which is lower.",
    "common": {"block_size": 16, "clip_norm": 1.0},
    "contenders": {"first": {"learning_rate": 0.1}, "second": {"noise_bands": 2}},
    "grid": {"learning_rate": [0.2, 0.3]},
    "seeds": [0, 1],
}


def test_a_grid_is_for_contenders_that_do_not_set_the_flag() -> None:
    found = quality.trainings_of(STUDY, {"block_size": 32})
    assert [(one.contender, one.chosen, one.seed) for one in found] == [
        ("first", {}, 0),
        ("first", {}, 1),
        *(("second", {"learning_rate": rate}, seed) for rate in (0.2, 0.3) for seed in (0, 1)),
    ]
    assert found[2].flags == {"block_size": 32, "clip_norm": 1.0, "noise_bands": 2, "learning_rate": 0.2}
    assert len({one.key for one in found}) == len(found)


def test_a_training_is_the_same_wherever_its_files_are() -> None:
    first, second = (quality.Training("a", {}, {"train_file": f"/{name}/rows"}, 0).key for name in ("here", "there"))
    assert first == second != quality.Training("a", {}, {"train_file": "rows"}, 0).key


def test_flags_become_words() -> None:
    flags = {"trainable": ["a", "b"], "gradient_ckpt": True, "delta": None, "tried": "muon", "eval_freq": 3}
    assert list(quality.words_of(flags)) == ["--trainable", "a", "b", "--gradient_ckpt", "--eval_freq", "3"]


def test_contenders_are_compared_on_equal_seeds() -> None:
    trainings = quality.trainings_of(STUDY, {})
    losses = dict(zip((one.key for one in trainings), [1.0, 2.0, 1.5, 2.5, 0.5, 1.0], strict=True))
    done = {key: {"loss": loss, "scores": None} for key, loss in losses.items()}
    lines = quality.table(trainings, done).splitlines()[2:]
    assert lines == [
        "| first |  | 1.500 ± 0.707 |  | 1.000, 2.000 |",
        "| second | learning_rate 0.2 | 2.000 ± 0.707 | +0.500 ± 0.000 | 1.500, 2.500 |",
        "| second | learning_rate 0.3 | 0.750 ± 0.354 | -0.750 ± 0.250 | 0.500, 1.000 |",
    ]
    assert quality.table(trainings, {}) == "No training is done."


def test_classifiers_are_judged_by_their_accuracy() -> None:
    assert quality.score_of({"loss": 0.3, "scores": {"validation": {"accuracy": 0.8}}}) == 0.8


def test_a_study_trains_and_does_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows, runs = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "runs.jsonl"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 8))
    flags = {"train_file": str(rows), "validation_file": str(rows), "model_name_or_path": str(model)}
    flags |= {"trainable": "all", "block_size": 16, "max_train_steps": 2, "target_epsilon": 8, "delta": 1e-3}
    flags |= {"per_device_train_batch_size": 8, "noise_bands": 2}
    study = {"title": "A", "about": "B.", "common": flags, "seeds": [0]}
    study["contenders"] = {"adam": {"learning_rate": 1e-3}, "muon": {"tried": "muon", "learning_rate": 1e-2}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    given = [str(file), "--runs", str(runs), "--workers", "1", "--output", str(tmp_path / "result.md")]
    quality.main(given)
    lines = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [line["contender"] for line in lines] == ["adam", "muon"]
    assert all(line["noise_bands"] == 2 and 0 < line["loss"] != line["loss_start"] for line in lines)
    assert lines[0]["loss"] != lines[1]["loss"]
    assert str(tmp_path) not in runs.read_text()
    capsys.readouterr()
    quality.main(given)
    assert len(runs.read_text().splitlines()) == 2
    assert "of 2:" not in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_flags_of_a_study_are_flags_of_train_clm(path: Path) -> None:
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert study["title"]
    assert study["about"]
    trainings = quality.trainings_of(study, {"model_name_or_path": "m", "train_file": "rows.jsonl"})
    assert trainings
    for one in trainings:
        assert {"optimizer", "learning_rate", "noise_bands"} <= one.flags.keys(), "defaults may change"
        parse(*CAUSAL_LM_GROUPS, args=[*quality.words_of(one.flags), "--output_dir", "out"])
