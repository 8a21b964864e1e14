"""The loop over tokens: sharing prompts and leaving out ended texts change no text, and save what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tests.processes import run_processes
from tests.tiny import tiny_llama
from utils.generation import decoding
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn, sampling_config
from utils.generation.batches import encode_prompt
from utils.generation.decoding import Decoding
from utils.generation.hf import draw_batch
from utils.models.loading import load_tokenizer

PROMPTS = ["Abstract: ", "The cat sat on the mat. A dog ran over the hill.\n", "Hello, how are you?\n"]
MANY = [PROMPTS[row % 3] for row in range(9)]
LENGTH = 60


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


def _windowed() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=400, sliding_window=6, **sizes, **heads)).eval()


def _model(kind: str) -> PreTrainedModel:
    return _windowed() if kind == "windowed" else tiny_llama(vocab_size=400)


def _draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **kwargs: Any) -> list[Drawn]:
    sampling = SamplingArguments("unused", max_length=LENGTH, **kwargs)
    config = sampling_config(model, tokenizer, sampling)
    config.eos_token_id = list(range(0, 400, 40))  # texts end after 20 to 40 tokens
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return draw_batch(model, tokenizer, ids, config, max_length=LENGTH, seed=3, stop=sampling.stop or ())


def _sizes(model: nn.Module) -> list[tuple[int, int]]:
    """(rows, tokens) of each forward pass from now on."""
    found: list[tuple[int, int]] = []

    def note(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        found.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("kind", ["llama", "windowed"])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0}, {"top_k": 0, "top_p": 1.0}, {"stop": ["e", "o"]}, {"repetition_penalty": 1.2}]
)
def test_texts_are_those_of_a_batch_that_shares_nothing(
    kind: str, how: dict[str, Any], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(kind)
    prompts = MANY if "repetition_penalty" not in how else PROMPTS[:1] * 9
    shared, sizes = _draw(model, tokenizer, prompts, **how), _sizes(model)
    monkeypatch.setattr(decoding, "_selectable", lambda _: False)
    assert shared == _draw(model, tokenizer, prompts, **how)
    assert {rows for rows, _ in sizes} == {9}, "this side shared too"
    if how.get("temperature") != 0:
        assert len({drawn.text for drawn in shared}) > 6, "equal prompts must get different texts"
        assert len({drawn.tokens for drawn in shared}) > 2, "they must end at different places"


def test_a_prompt_is_read_once_and_a_text_that_ended_costs_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    model = _model("llama")
    sizes = _sizes(model)
    texts = _draw(model, tokenizer, MANY)
    (prompts, width), *later = sizes
    assert (prompts, width) == (3, max(len(encode_prompt(tokenizer, prompt)) for prompt in PROMPTS))
    assert {tokens for _, tokens in later} == {1}
    going = [sum(drawn.tokens > step for drawn in texts) for step in range(1, max(one.tokens for one in texts))]
    assert [rows for rows, _ in later][: len(going)] >= going
    assert [rows for rows, _ in later] == sorted((rows for rows, _ in later), reverse=True)
    assert later[-1][0] < 9


def test_greedy_texts_are_those_of_transformers_own_loop(tokenizer: PreTrainedTokenizerBase) -> None:
    model = _model("llama")
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[0])] * 2)
    config = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=[399], pad_token_id=2)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "generation_config": config}
    loop = Decoding(lambda scores, _: scores.argmax(1), torch.zeros(2, 20), in_step=False)
    assert torch.equal(model.generate(ids, **given), model.generate(ids, custom_generate=loop, **given))


def _passes_of_a_rank(rank: int, _gather: object) -> int:
    """How often a rank runs its model, when its texts end after 3 (rank 0) or 8 tokens (rank 1)."""
    model, tokens = _model("llama"), 3 if rank == 0 else 8
    sizes, ids = _sizes(model), torch.tensor([[5, 6, 7]] * 2)
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=[399], pad_token_id=2)
    loop = Decoding(lambda scores, _: scores.argmax(1), torch.zeros(2, tokens), in_step=True)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, custom_generate=loop)
    assert output.shape == (2, 3 + tokens)
    return len(sizes)


def test_ranks_that_share_weights_run_equally_often() -> None:
    assert run_processes(2, _passes_of_a_rank) == [8, 8]
