"""Label words: one for each class, those of a GLUE task, and a suffix for decoders alone."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from utils.classification.glue import GLUE
from utils.classification.head_arguments import WORDS_OF_TASK, HeadArguments


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"label_words": ["bad", " "]}, "--label_words='bad,  ': one of the words is empty"),
        ({"label_words": ["bad", " bad"]}, "--label_words='bad,  bad': two classes have the same word"),
        ({"prompt_suffix": " "}, "--prompt_suffix=' ': holds only white space"),
    ],
)
def test_words_that_say_nothing_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{told}"):
        HeadArguments(**given)


def test_auto_stands_for_the_words_of_the_task_and_the_model() -> None:
    auto = HeadArguments(["auto"])
    assert auto.of_task("sst2", decoder=True) == HeadArguments(["negative", "positive"], "\nSentiment:")
    assert auto.of_task("sst2", decoder=False) == HeadArguments(["a terrible movie", "a great movie"])
    mine = HeadArguments(["auto"], " All in all:")
    assert mine.of_task("sst2", decoder=True) == HeadArguments(["negative", "positive"], " All in all:")
    own = HeadArguments(["bad", "good"])
    assert own.of_task("anything", decoder=False) == own
    with pytest.raises(
        InvalidArgument, match=r"^--label_words='auto': there are no built-in words for mine with an encoder"
    ):
        auto.of_task("mine", decoder=False)


def test_the_known_words_are_one_for_each_class() -> None:
    for name, known in WORDS_OF_TASK.items():
        for decoder in (True, False):
            if decoder or known.descriptions is not None:
                found = HeadArguments(["auto"]).of_task(name, decoder=decoder)
                found.require_one_each(GLUE[name].class_names, name)
                assert len(found.label_words or ()) == len(GLUE[name].class_names)


def test_an_encoder_takes_no_suffix() -> None:
    with pytest.raises(InvalidArgument, match=r"^--prompt_suffix=' It was': works only with decoders"):
        HeadArguments(None, " It was").of_task("sst2", decoder=False)


def test_another_number_of_words_than_classes_is_refused() -> None:
    HeadArguments(["bad", "good"]).require_one_each(("negative", "positive"), "sst2")
    HeadArguments(None, " It was").require_one_each(("negative", "positive"), "sst2")
    told = r"^--label_words='bad, so, good': there are 3 words, but sst2 has 2 classes: negative, positive; give one"
    with pytest.raises(InvalidArgument, match=told):
        HeadArguments(["bad", "so", "good"]).require_one_each(("negative", "positive"), "sst2")
