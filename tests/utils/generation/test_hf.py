"""Stop strings in batches by `generate`; the drawing itself is tested with the runs, in test_run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.tiny import tiny_llama
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn
from utils.generation.batches import make_jobs
from utils.generation.hf import GenerateBackend, StopStrings
from utils.models.loading import load_tokenizer

PROMPTS = ["Abstract: ", "Hello, how are you?\n", "The cat sat on the mat. A dog ran over the hill.\n", "a\n\n"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny Llama that seldom ends a text."""
    model = tiny_llama(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight[2] = 0
    return model


def _draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> dict[int, Drawn]:
    sampling = SamplingArguments("unused", temperature=0, max_length=45, batch_size=4, **kwargs)
    drawing = GenerateBackend(model, tokenizer, sampling).draw(make_jobs(tokenizer, PROMPTS, 45), ())
    return {job.index: drawn for finished in drawing for job, drawn in finished}


def test_texts_are_cut_where_they_stop_and_the_others_go_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = _draw(model, tokenizer)
    stop = [whole[0].text[4:12], whole[1].text[8:16], "never written"]
    texts = _draw(model, tokenizer, stop=stop)
    for index, drawn in texts.items():
        found = [place for one in stop if (place := whole[index].text.find(one)) >= 0]
        assert drawn.ended == bool(found)
        assert drawn.text == whole[index].text[: min(found, default=None)]
    assert {texts[0].ended, texts[1].ended} == {True}
    assert not all(drawn.ended for drawn in texts.values()), "some text must show that it goes on"


def test_drawing_ends_once_every_text_has_stopped(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    generate = model.generate

    def measured(*args: Any, **kwargs: Any) -> torch.Tensor:
        output = generate(*args, **kwargs)
        widths.append(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(model, "generate", measured)
    whole = _draw(model, tokenizer)
    texts = _draw(model, tokenizer, stop=[drawn.text[3:6] for drawn in whole.values()])
    assert all(drawn.ended for drawn in texts.values())
    assert max(drawn.tokens for drawn in texts.values()) == widths[1] < widths[0]


def test_the_prompt_is_no_part_of_a_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    line_break = tokenizer("\n").input_ids
    prompt = torch.tensor([[5, *line_break]])
    stopping = StopStrings(tokenizer, ["\n\n"], width=prompt.shape[1])
    once, twice = (torch.cat([prompt, torch.tensor([line_break * times])], dim=1) for times in (1, 2))
    assert stopping(once, torch.empty(0)).tolist() == [False]
    assert stopping(twice, torch.empty(0)).tolist() == [True]


def test_a_text_of_padding_after_its_stop_is_counted_without_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Where padding is no end token, a row that stopped is padded with it while its neighbours go on."""
    tokenizer.pad_token_id = 0
    try:
        whole = _draw(model, tokenizer)
        stopped = _draw(model, tokenizer, stop=[whole[0].text[4:6]])
    finally:
        tokenizer.pad_token_id = 2
    assert stopped[0].ended
    assert stopped[0].tokens < whole[0].tokens
