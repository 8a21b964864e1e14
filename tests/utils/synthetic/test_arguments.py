"""The command line of the comparison."""

from __future__ import annotations

import re

import pytest

from dptune._validate import InvalidArgument
from utils.cli.flags import parse
from utils.synthetic.arguments import HELD_OUT, ProxyArguments, StatisticsArguments, TextArguments
from utils.synthetic.proxy_settings import TINY, ProxySettings

NEEDED = ["--held_out_file", "h.jsonl", "--output_dir", "out"]


def texts(*flags: str) -> TextArguments:
    (found,) = parse(TextArguments, args=[*NEEDED, *flags])
    return found


def test_samples_are_named_after_their_files_or_as_asked() -> None:
    assert list(texts("--synthetic_file", "a/x.jsonl", "b/y.jsonl").named_files) == ["x", "y"]
    assert list(texts("--synthetic_file", "a/x.jsonl", "b/x.jsonl").named_files) == ["a/x", "b/x"]
    named = texts("--synthetic_file", "a/x.jsonl", "b/x.jsonl", "--names", "private", "plain")
    assert named.named_files == {"private": "a/x.jsonl", "plain": "b/x.jsonl"}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--names", "a"], "--names='a': there are 2 synthetic files"),
        (["--names", "a", "a"], "--names='a a': two names are equal"),
        (["--names", "a", HELD_OUT], f"--names='{HELD_OUT}': give another name"),
        (["--names", "a", "reference"], "--names='reference': give another name"),
        (["--names", "a", " "], "--names=' ': give another name"),
        (["--names", "a", "b\x1b[2J"], "printable"),
        (["--names", "a", "b" * 61], "at most 60"),
        (["--train_file", "./h.jsonl"], "--train_file='./h.jsonl': is also --held_out_file"),
        (["--max_texts", "9"], "--max_texts=9: give a whole number of at least 10"),
    ],
)
def test_mistakes_are_refused_in_a_line(flags: list[str], complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(complaint)):
        texts("--synthetic_file", "x.jsonl", "y.jsonl", *flags)


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (StatisticsArguments, ["--clusters", "1"]),
        (StatisticsArguments, ["--bootstrap", "1"]),
        (StatisticsArguments, ["--passage_words", "0"]),
        (StatisticsArguments, ["--embedding_dimensions", "0"]),
        (ProxyArguments, ["--proxy_steps", "0"]),
        (ProxyArguments, ["--proxy_batch_size", "0"]),
        (ProxyArguments, ["--proxy_max_length", "0"]),
        (ProxyArguments, ["--proxy_learning_rate", "0"]),
        (ProxyArguments, ["--proxy_model", "m", "--proxy_tokenizer", "t"]),
    ],
)
def test_values_out_of_range_are_refused_by_flag(arguments: type, flags: list[str]) -> None:
    with pytest.raises(InvalidArgument, match=f"^{flags[-2]}="):
        parse(arguments, args=flags)


def test_the_models_get_their_settings_or_are_none_at_all() -> None:
    (found,) = parse(ProxyArguments, args=["--proxy_steps", "5", "--proxy_learning_rate", "0.5"])
    settings = found.settings(seed=3)
    assert settings == ProxySettings(TINY, None, 5, found.proxy_batch_size, found.proxy_max_length, 0.5, 3)
    (found,) = parse(ProxyArguments, args=["--proxy_model", "none"])
    assert found.settings(seed=3) is None
