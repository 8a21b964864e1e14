"""The proxy models: each token predicted once, scores as by hand, and better text teaching more."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dptune._validate import InvalidArgument
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer
from tests.tokenizer_kinds import ending_where_unknown, unigram
from utils.synthetic.proxy_model import (
    Predictions,
    ProxySettings,
    cut_windows,
    make_model,
    make_tokenizer,
    predict_texts,
    result_name,
    summarise_predictions,
    train_proxy,
)

TEXTS = ["The cat sat on the mat.", "A dog ran over the hill to see the sun go down.", "Hi"]
QUICK = ProxySettings(steps=60, batch_size=4, max_length=32)


def test_every_token_and_the_end_are_predicted_once() -> None:
    tokenizer = tiny_tokenizer()
    for length in (1, 3, 7, 100):
        windows = cut_windows(TEXTS, tokenizer, length)
        assert max(map(len, windows.ids)) <= length + 1
        for owner, text in enumerate(TEXTS):
            mine = [ids for ids, of in zip(windows.ids, windows.owners, strict=True) if of == owner]
            predicted = [token for ids in mine for token in ids[1:]]
            assert predicted == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            before = [tokenizer.eos_token_id, *predicted]
            assert [ids[0] for ids in mine] == [before[start] for start in range(0, len(predicted), length)]


def test_a_special_token_spelled_out_in_a_text_is_only_text() -> None:
    tokenizer = make_tokenizer(ProxySettings(), TEXTS)
    (ids,) = cut_windows(["a<|endoftext|>b"], tokenizer, 100).ids
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids[1:-1]) == "a<|endoftext|>b"


def test_no_spelling_of_a_special_token_ends_a_text() -> None:
    tokenizer = unigram()
    for ids in cut_windows(["a</s>b", "a \uff1c/s\uff1e b"], tokenizer, 100).ids:
        assert ids.count(tokenizer.eos_token_id) == 2
    with pytest.raises(InvalidArgument, match=r"--proxy_model=.* the text of row 2; change"):
        cut_windows(["cat", "dog"], ending_where_unknown(), 100)


def test_the_made_tokenizer_knows_every_character() -> None:
    tokenizer = make_tokenizer(ProxySettings(), TEXTS)
    assert tokenizer.decode(tokenizer("naïve 你好 \U0001f600")["input_ids"]) == "naïve 你好 \U0001f600"


def test_predictions_are_those_of_each_text_alone() -> None:
    model, tokenizer = tiny_llama(vocab_size=400), tiny_tokenizer()
    found = predict_texts(model, cut_windows(TEXTS, tokenizer, 100), batch_size=2)
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([[2, *tokenizer(text)["input_ids"], 2]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double().log_softmax(-1)
        assert found.tokens[number] == ids.shape[1] - 1
        assert found.correct[number] == (logits.argmax(-1) == ids[0, 1:]).sum()
        expected = -logits.gather(1, ids[0, 1:, None]).sum()
        assert found.nats[number] == pytest.approx(float(expected), rel=1e-5)


def test_the_summary_is_over_tokens() -> None:
    found = summarise_predictions(Predictions(np.array([1.0, 3]), np.array([2.0, 8]), np.array([4.0, 6])), num_bytes=40)
    assert found["accuracy"] == 0.4
    assert found["nats_per_token"] == 1
    assert found["bits_per_byte"] == pytest.approx(10 / math.log(2) / 40)
    # Two texts drawn with replacement: 1/2, 4/10 twice and 3/8 are equally likely.
    assert found["accuracy_error"] == pytest.approx(np.std([1 / 2, 0.4, 0.4, 3 / 8]), rel=0.1)


def test_training_on_the_same_language_teaches_more_than_on_another() -> None:
    held_out = [f"the {a} {b} over the hill" for a in ("cat", "dog", "sun") for b in ("ran", "sat", "fell")]
    other = [" ".join(reversed(text.upper().split())) for text in held_out]
    tokenizer = make_tokenizer(QUICK, held_out)
    scores = []
    for texts in (held_out, other, None):
        model = make_model(QUICK, tokenizer)
        if texts is not None:
            train_proxy(model, cut_windows(texts, tokenizer, 32), QUICK)
        scores.append(
            summarise_predictions(predict_texts(model, cut_windows(held_out, tokenizer, 32), 4), 100)["accuracy"]
        )
    assert scores[0] > 0.6
    assert scores[1] < scores[0] - 0.3
    assert scores[2] < 0.1


def test_the_seed_decides_the_model_and_its_training_and_disturbs_no_other_randomness() -> None:
    tokenizer = make_tokenizer(QUICK, TEXTS)
    windows = cut_windows(TEXTS, tokenizer, 32)

    def trained(seed: int) -> torch.Tensor:
        settings = dataclasses.replace(QUICK, steps=3, seed=seed)
        model = make_model(settings, tokenizer)
        train_proxy(model, windows, settings)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = trained(0)
    assert torch.rand(1) == expected
    assert torch.equal(first, trained(0))
    assert not torch.allclose(first, trained(1))


def test_a_given_model_is_trained_whole(tiny_model_dir: Path) -> None:
    settings = ProxySettings(model=str(tiny_model_dir), steps=2, batch_size=2, max_length=16)
    assert settings.peak_rate == 5e-5
    tokenizer = make_tokenizer(settings, TEXTS)
    before, model = make_model(settings, tokenizer), make_model(settings, tokenizer)
    train_proxy(model, cut_windows(TEXTS, tokenizer, 16), settings)
    for one, other in zip(before.parameters(), model.parameters(), strict=True):
        assert not torch.equal(one, other)


def test_the_fingerprint_changes_with_whatever_changes_the_result(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    settings = ProxySettings(model=str(folder))
    seen = {result_name(settings, ["a"], ["b"])}
    assert result_name(settings, ["a"], ["b"]) in seen
    for field, value in (("steps", 7), ("batch_size", 3), ("max_length", 5), ("learning_rate", 0.1), ("seed", 1)):
        seen.add(result_name(dataclasses.replace(settings, **{field: value}), ["a"], ["b"]))
    seen |= {result_name(settings, texts, held) for texts, held in ((["a", "c"], ["b"]), (None, ["b"]), (["a"], []))}
    (folder / "model.safetensors").write_bytes(b"another model")
    seen.add(result_name(settings, ["a"], ["b"]))
    assert len(seen) == 10
