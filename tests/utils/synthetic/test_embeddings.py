"""Texts as vectors: alike texts point alike, and nothing is learned but from what is fitted."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from dptune._validate import InvalidArgument
from utils.synthetic.embeddings import make_embedder

TEXTS = ["a cat sat on the mat", "the cat ran", "a dog ran after the cat", "stocks fell again", "stocks rose on news"]


def test_vectors_have_length_one_and_alike_texts_point_alike() -> None:
    embedder = make_embedder(dimensions=4)
    embedder.fit(TEXTS)
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 4)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[3]
    assert vectors[3] @ vectors[4] > vectors[3] @ vectors[2]


def test_a_text_of_unknown_words_is_nothing() -> None:
    embedder = make_embedder()
    embedder.fit(TEXTS)
    assert embedder.embed(["zebras xylophone"]).tolist() == [[0.0] * 5]  # no more dimensions than texts


def test_what_is_embedded_teaches_it_nothing() -> None:
    embedder = make_embedder()
    embedder.fit(TEXTS)
    before = embedder.embed(TEXTS)
    embedder.embed(["Jane Roe has measles"] * 10)
    assert np.array_equal(embedder.embed(TEXTS), before)


def test_one_text_at_a_time_gives_the_same_vectors_to_the_last_bit() -> None:
    embedder = make_embedder()
    embedder.fit(TEXTS)
    assert np.array_equal(embedder.embed(TEXTS, alone=True), np.stack([embedder.embed([text])[0] for text in TEXTS]))


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT of random weights, as sentence-transformers saves it."""
    pytest.importorskip("sentence_transformers", reason="an extra: pip install '.[embeddings]'")
    from sentence_transformers import SentenceTransformer, models

    folder = tmp_path_factory.mktemp("sentence-model")
    words = sorted({word for text in TEXTS for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=5 + len(words), **sizes)).save_pretrained(folder / "bert")
    parts = [models.Transformer(str(folder / "bert")), models.Pooling(sizes["hidden_size"])]
    SentenceTransformer(modules=parts).save(str(folder / "model"))
    return str(folder / "model")


def test_a_private_text_is_embedded_as_if_there_were_no_other(sentence_model: str) -> None:
    embedder = make_embedder(sentence_model)
    texts = [*TEXTS, " ".join(TEXTS)]  # the longest, which the others would be padded to
    by_itself = np.stack([embedder.embed([text])[0] for text in texts])
    assert np.array_equal(embedder.embed(texts, alone=True), by_itself)
    assert embedder.embed(texts) == pytest.approx(by_itself, abs=1e-6)


def test_texts_without_words_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="none of the 2 texts"):
        make_embedder().fit(["...", "!"])


def test_a_model_needs_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.synthetic.embeddings.find_spec", lambda _: None)
    with pytest.raises(InvalidArgument, match="pip install sentence-transformers"):
        make_embedder("some/model")


def test_a_sentence_transformers_model_is_asked_for_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            if name != "there":
                raise OSError("not there")

        def encode(self, texts: list[str], **how: Any) -> np.ndarray:
            assert how["normalize_embeddings"]
            assert how["show_progress_bar"] == (len(texts) > 1000)
            return np.ones((len(texts), 3)) / 3**0.5

    monkeypatch.setattr("utils.synthetic.embeddings.find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "sentence_transformers", type("module", (), {"SentenceTransformer": Model}))  # type: ignore[arg-type]
    embedder = make_embedder("there")
    embedder.fit(TEXTS)
    assert embedder.embed(TEXTS).dtype == np.float32
    assert len(embedder.embed(TEXTS * 300)) == 1500  # a bar, not minutes of silence
    with pytest.raises(InvalidArgument, match="cannot be loaded"):
        make_embedder("elsewhere")
