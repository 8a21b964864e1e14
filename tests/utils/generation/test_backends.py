"""What all backends share: where a text is cut, when it has ended, how long it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from utils.generation.backends import Drawn, cut, drawn_from, end_tokens, holds_stop
from utils.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (" One two", [], ("One two", False)),
        (" One two", ["three"], ("One two", False)),
        (" One two", ["two"], ("One ", True)),
        ("a USER: b\n", ["\n", "USER:"], ("a ", True)),  # the first in the text, not in the list
        ("\n\nUSER:", ["\n\n"], ("", True)),
        ("", ["x"], ("", False)),
    ],
)
def test_a_text_is_cut_before_its_first_stop_string(text: str, stop: list[str], expected: tuple[str, bool]) -> None:
    assert cut(text, stop) == expected


def test_a_text_ends_at_its_first_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer(" The patients").input_ids
    rest = tokenizer(" were given a placebo").input_ids
    assert drawn_from(tokenizer, [*words, 2, *rest, 2], [2], ()) == Drawn("The patients", len(words) + 1, True)
    cut_off = Drawn("The patients were given a placebo", len([*words, *rest]), False)
    assert drawn_from(tokenizer, [*words, *rest], [2], ()) == cut_off
    # A stop string behind the end token is not the text's.
    assert drawn_from(tokenizer, [*words, 2, *rest], [2], ["placebo"]).text == "The patients"


def test_a_text_that_stopped_has_ended_and_padding_is_not_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer(" The patients were").input_ids
    tokenizer.pad_token_id = 0
    try:
        stopped = drawn_from(tokenizer, [*words, 0, 0, 0], [2], [" were"])
    finally:
        tokenizer.pad_token_id = 2
    assert stopped == Drawn("The patients", len(words), True)


@pytest.mark.parametrize("stop", ["USER:", "é", "\n\n", " the"])
def test_a_stop_string_is_seen_with_the_token_that_completes_it(tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
    before = tokenizer("The cat sat on a mat. A dog ran up hills. " * 5).input_ids
    ids = [*before, *tokenizer(stop).input_ids]
    seen = [holds_stop(tokenizer, ids[: end + 1], [stop, "never"]) for end in range(len(ids))]
    assert seen == [False] * (len(ids) - 1) + [True]


def test_end_tokens_are_the_models_and_the_tokenizers(tokenizer: PreTrainedTokenizerBase) -> None:
    assert end_tokens(GenerationConfig(eos_token_id=[9, 5]), tokenizer) == [2, 5, 9]
    assert end_tokens(GenerationConfig(eos_token_id=7), tokenizer) == [2, 7]
    assert end_tokens(GenerationConfig(), tokenizer) == [2]
