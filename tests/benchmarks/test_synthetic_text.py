"""The study of synthetic text: its data are split as said, its classifier learns from what it is given alone, and its
page holds the numbers that the runs left."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import synthetic_text, synthetic_text_data
from benchmarks.synthetic_text_data import StudyDataArguments, split_messages
from benchmarks.topic_classifier import Labelled, majority, train_and_test
from dptune import InvalidArgument
from utils.cli.flags import parse

HEARTS = ["the heart beats", "heart failure in old age", "a failing heart", "heart rate and age"]
LUNGS = ["the lung breathes", "lung cancer and smoke", "a smoky lung", "lung volume at rest"]
TRAIN = Labelled([*HEARTS[:3], *LUNGS[:3]], ["hearts"] * 3 + ["lungs"] * 3)
TEST = Labelled([HEARTS[3], LUNGS[3], "heart or what"], ["hearts", "lungs", "hearts"])


def test_the_classifier_learns_topics_from_its_texts():
    score = train_and_test(TRAIN, TEST)
    assert score.accuracy == 1
    assert score.macro_f1 == 1
    assert score.error == 0
    swapped = Labelled(TRAIN.texts, TRAIN.topics[::-1])
    assert train_and_test(swapped, TEST).accuracy == 0


def test_words_that_only_the_test_texts_have_teach_nothing():
    test = Labelled(["kidney", "kidney"], ["hearts", "lungs"])
    score = train_and_test(TRAIN, test)
    assert score.accuracy == 0.5
    assert 0.2 < score.error < 0.5, "sqrt(1/8) = 0.35: of the mean of two draws of 0 or 1"


def test_the_majority_topic_is_the_test_texts():
    assert majority(TEST) == pytest.approx(2 / 3)


def test_a_draw_keeps_texts_and_topics_together():
    drawn = TRAIN.draw(4, seed=1)
    assert len(drawn) == 4
    pairs = set(zip(TRAIN.texts, TRAIN.topics, strict=True))
    assert set(zip(drawn.texts, drawn.topics, strict=True)) < pairs
    assert len(TRAIN.draw(100, seed=1)) == 6


def test_each_message_is_once_on_one_side():
    messages = [f"message {i}" for i in range(8)] * 2 + ["word " * 5]
    train, held_out = split_messages(messages, longest=4, held_out=3)
    assert len(train) == 5
    assert len(held_out) == 3
    assert sorted([*train, *held_out]) == [f"message {i}" for i in range(8)]


def test_holding_out_everything_is_refused():
    with pytest.raises(InvalidArgument, match=r"--held_out_messages=2: there are 2 different"):
        split_messages(["a", "a", "b"], longest=4, held_out=2)


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(folder: Path, topic: str = "ADHD") -> Path:
    chat = write(folder / "chat.jsonl", [{"instruction": f"message {i}"} for i in range(6)])
    abstract = {"topic": topic, "title": "One two three.", "text": "Four five six seven."}
    flags = ["--chat", chat, "--held_out_messages", "2", "--words", "5", "--texts_a_topic", "3"]
    for name in ("abstracts_train", "abstracts_held_out"):
        flags += [f"--{name}", write(folder / f"{name}.jsonl", [abstract])]
    (args,) = parse(StudyDataArguments, args=[*flags, "--output_dir", str(folder / "study")])
    synthetic_text_data.main(args)
    return folder / "study"


def test_the_data_are_written_in_the_formats_of_training_and_sampling(tmp_path):
    study = prepare(tmp_path)
    rows = {path.name: path.read_text().splitlines() for path in study.iterdir()}
    assert len(rows["chat_train.jsonl"]) == 4
    assert len(rows["chat_held_out.jsonl"]) == 2
    wish = "Title and abstract of a clinical study on ADHD:"
    expected = {"instruction": wish, "answer": "One two three. Four five"}
    assert json.loads(rows["labelled_abstracts.jsonl"][0]) == expected
    assert rows["how_many.txt"] == [" #### 1000"]
    assert len(rows["topics.txt"]) == 16
    assert f"{wish} #### 3" in rows["topics.txt"]


def test_an_unknown_topic_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="the topic Bones has no name"):
        prepare(tmp_path, topic="Bones")


def leave_a_study(folder: Path) -> Path:
    """What the runs of synthetic_text.sh leave, in `folder`; returns the study's own folder."""
    study = folder / "study"
    report = {"epsilon": 7.9876, "delta": 1e-5, "num_examples": 2841, "adjacency": "add or remove one"}
    report |= {"accountant": "PLD", "noise_multiplier": 0.97, "clip_norm": 1.0, "expected_batch_size": 512, "steps": 33}
    report |= {"privacy_unit": "one row"}
    score = {"accuracy": 0.125, "accuracy_error": 0.0021, "nats_per_token": 5.5}
    names = ["private", "plain", "untrained model", "real training rows"]
    evaluation = {
        "proxy": {name: score | {"accuracy": 0.1 + i / 100} for i, name in enumerate([*names, "untrained"])},
        "divergence": {name: {"mauve": 0.5 + i / 10, "mauve_error": 0.05} for i, name in enumerate(names[:3])},
        "overlap": {name: {"copies": 1, "passages": 4} for name in names[:3]},
    }
    for data in ("chat", "abstracts"):
        for job, loss in (("private", 3.5), ("plain", 3.25)):
            path = folder / f"outputs/study-{data}-{job}"
            (path / "publish").mkdir(parents=True)
            (path / "publish" / "privacy_report.json").write_text(json.dumps(report))
            (path / "run_config.json").write_text(json.dumps({"model_name_or_path": "somewhere/a-model-1B"}))
            (path / "all_results.json").write_text(
                json.dumps({"steps": 33, "eval_loss": loss, "eval_loss_before": 4.125})
            )
        for job in ("private", "plain", "untrained"):
            path = folder / f"inference_outputs/study-{data}-{job}"
            path.mkdir(parents=True)
            (path / "summary.json").write_text(json.dumps({"texts": 6, "ended": 5}))
            # the private generator's texts are on the topic, the others' say nothing of it
            pairs = zip(TRAIN.texts if job == "private" else ["word"] * 6, TRAIN.topics, strict=True)
            write(path / "generations.jsonl", [{"prompt": f"{topic}\n", "text": text} for text, topic in pairs])
        (study / data).mkdir(parents=True)
        (study / data / "evaluation.json").write_text(json.dumps(evaluation))
    for name, rows in (("labelled_abstracts", TRAIN), ("abstracts_held_out", TEST)):
        pairs = zip(rows.topics, rows.texts, strict=True)
        write(study / f"{name}.jsonl", [{"instruction": topic, "answer": text} for topic, text in pairs])
    known = {"texts": 2, "too_short": 1, "beginning": 50, "continuation": 50, "in_a_row": [0, 50]}
    (study / "contamination.json").write_text(json.dumps(known))
    return study


def test_the_page_has_every_line_of_the_comparison(tmp_path, monkeypatch):
    study = leave_a_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthetic_text.py", "--study", str(study)])
    synthetic_text.main(synthetic_text.StudyArguments(study=str(study), output="result.md"))
    page = Path("result.md").read_text()
    assert "a-model-1B with LoRA" in page
    assert "somewhere" not in page
    assert "| private | 7.988 | 33 | 3.500 | 6 | 5 | - |" in page
    assert "| plain | none | 33 | 3.250 | 6 | 5 | - |" in page
    assert "| untrained model | none | 0 | 4.125 | 6 | 5 | - |" in page
    assert "| untrained model | 0.1200 ± 0.0021 | 5.500 | 0.700 ± 0.050 | 1 + 3 |" in page
    assert "| real training rows | 0.1300 ± 0.0021 | 5.500 | - | - |" in page
    assert "| nothing | 0.1400 ± 0.0021 | 5.500 | - | - |" in page
    assert "| private | 6 | 1.000 ± 0.000 | 1.000 |" in page
    assert re.search(r"\| plain \| 6 \| 0\.(333|667) ±", page), "it can name one topic only"
    assert "| majority topic | 0 | 0.667 | - |" in page
    assert "continued 1 of 2 for 50 tokens without a mistake" in page


def test_a_page_of_one_part_holds_that_part(tmp_path, monkeypatch):
    study = leave_a_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["synthetic_text.py", "--study", str(study)])
    synthetic_text.main(synthetic_text.StudyArguments(study=str(study), data=["abstracts"], output="result.md"))
    page = Path("result.md").read_text()
    assert "## Abstracts, by topic" in page
    assert "## Chat messages" not in page
