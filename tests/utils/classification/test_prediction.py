"""A trained classifier is loaded whole or refused, and its predictions do not depend on batches or ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dptune._validate import InvalidArgument
from tests.classifier_folders import BAD, GOOD, save_bert
from utils.classification.files import load_classifier, load_classifier_tokenizer, save_classifier
from utils.classification.modes import prepare_mode
from utils.classification.prediction import load_trained_classifier, predictions

TEXTS = [f"the film was {'very ' * (at % 4)}{(GOOD + BAD)[at % 6]}" for at in range(7)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole classifier with eleven classes, so that their order as text is not that of their numbers."""
    names = [f"class {number}" for number in range(11)]
    base, folder = save_bert(tmp_path_factory.mktemp("bert"), initializer_range=1.0), tmp_path_factory.mktemp("whole")
    tokenizer = load_classifier_tokenizer(str(base))
    torch.manual_seed(0)
    model, _ = load_classifier(str(base), names, pad_token_id=tokenizer.pad_token_id)
    model, _ = prepare_mode(model, "last-layer")
    model.classifier.weight.data.normal_()
    save_classifier(model, tokenizer, folder, base_model="x")
    return folder


def test_each_text_gets_the_probabilities_that_it_has_alone(whole: Path) -> None:
    loaded = load_trained_classifier(str(whole), max_length=16)
    found = list(predictions(loaded, (TEXTS,), Accelerator(cpu=True), batch_size=2))
    assert len(found) == len(TEXTS)
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            alone = loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
        assert list(row["probabilities"]) == [f"class {number}" for number in range(11)]
        assert list(row["probabilities"].values()) == pytest.approx(alone.tolist(), abs=1e-5)
        assert (row["label"], row["class_name"]) == (int(alone.argmax()), f"class {int(alone.argmax())}")
    assert len({row["label"] for row in found}) > 1


def test_pairs_are_read_as_pairs(whole: Path) -> None:
    loaded = load_trained_classifier(str(whole), max_length=16)
    (row,) = predictions(loaded, (["good film"], ["bad plot"]), Accelerator(cpu=True), batch_size=2)
    with torch.no_grad():
        alone = loaded.model(**loaded.tokenizer("good film", "bad plot", return_tensors="pt")).logits[0].softmax(0)
    assert list(row["probabilities"].values()) == pytest.approx(alone.tolist(), abs=1e-5)


def test_a_classifier_of_single_texts_takes_no_pairs(whole: Path) -> None:
    loaded = load_trained_classifier(str(whole), max_length=16)._replace(num_texts=1)
    assert len(list(predictions(loaded, (["good film"],), Accelerator(cpu=True), batch_size=2))) == 1
    with pytest.raises(InvalidArgument, match=r"^--text_columns=2: the classifier was trained on 1 text per row"):
        list(predictions(loaded, (["good film"], ["bad plot"]), Accelerator(cpu=True), batch_size=2))


def test_a_head_that_is_missing_is_not_drawn_anew(whole: Path, tmp_path: Path) -> None:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidArgument, match=r"--model_path=.*lacks 2 weights such as classifier\.bias"):
        load_trained_classifier(str(tmp_path), max_length=16)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, r"--block_size=None: .* does not say how long texts may be"),
        ({"max_length": 65}, r"--block_size=65: the model's context is 64"),
        ({"max_length": 16, "base": "x"}, r"--model_name_or_path='x': is not read: .* holds a whole classifier"),
    ],
)
def test_what_does_not_fit_is_refused(whole: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        load_trained_classifier(str(whole), **given)
