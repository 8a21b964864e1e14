"""Continuous batching: the texts of plain `generate`, seeds, stop strings, and what the library hides when it fails."""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dptune import add_lora
from dptune._validate import InvalidArgument
from dptune.lora import adapters, merge_lora
from tests.processes import run_processes
from tests.tiny import tiny_llama
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn
from utils.generation.batches import encode_prompt, make_jobs
from utils.generation.continuous import ContinuousBackend
from utils.generation.hf import GenerateBackend
from utils.models.loading import load_tokenizer

PROMPTS = ["Abstract: ", "Hello, how are you?\n", "The cat sat on the mat. A dog ran over the hill.\n", "a\n\n", "Why"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


def _model(lora: str | None = None) -> PreTrainedModel:
    """A tiny Llama that seldom ends a text, with an adapter that changes what it writes ("apart" or "merged")."""
    model = tiny_llama(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight[2] = 0
    if lora is not None:
        add_lora(model, rank=4, alpha=8.0)
        for _, adapter in adapters(model):
            torch.nn.init.normal_(adapter.B.weight, generator=torch.Generator().manual_seed(1))
    if lora == "merged":
        merge_lora(model)
    return model.requires_grad_(False)


def _draw(
    kind: type[ContinuousBackend] | type[GenerateBackend],
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: PreTrainedModel | None = None,
    prompts: Sequence[str] = PROMPTS,
    done: Container[int] = (),
    share: tuple[int, int] = (0, 1),
    **kwargs: Any,
) -> dict[int, Drawn]:
    sampling = SamplingArguments(**{"output_dir": "unused", "max_length": 36, "batch_size": 2, **kwargs})
    jobs, (rank, world) = make_jobs(tokenizer, prompts, sampling.max_length), share
    drawing = kind(model or _model(), tokenizer, sampling).draw(jobs, done, rank=rank, world=world)
    pairs = [(job.index, drawn) for finished in drawing for job, drawn in finished]
    assert len(dict(pairs)) == len(pairs), "a text came twice"
    return dict(pairs)


@pytest.mark.parametrize("lora", [None, "apart", "merged"])
def test_greedy_texts_are_those_of_generate(tokenizer: PreTrainedTokenizerBase, lora: str | None) -> None:
    continuous, plain = (
        _draw(kind, tokenizer, model=_model(lora), temperature=0) for kind in (ContinuousBackend, GenerateBackend)
    )
    assert continuous == plain
    assert len({drawn.text for drawn in plain.values()}) == len(PROMPTS)
    assert (plain == _draw(GenerateBackend, tokenizer, temperature=0)) == (lora is None)


def test_texts_end_at_the_end_token_too(tokenizer: PreTrainedTokenizerBase) -> None:
    model, prompt = _model(), torch.tensor([encode_prompt(tokenizer, PROMPTS[0])])
    plain = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=2)
    greedy = model.generate(prompt, generation_config=plain, attention_mask=torch.ones_like(prompt))[0, -6:].tolist()
    model.generation_config.eos_token_id = [1, greedy[3]]
    drawn = _draw(ContinuousBackend, tokenizer, model=model, prompts=PROMPTS[:1], temperature=0)[0]
    length = greedy.index(greedy[3])
    assert drawn == Drawn(tokenizer.decode(greedy[:length]).lstrip(), length + 1, True)


def test_sampling_follows_its_seed_and_leaves_the_global_generator(tokenizer: PreTrainedTokenizerBase) -> None:
    model = _model()  # making it seeds the global generator
    state = torch.get_rng_state()
    first, again, other = (
        _draw(ContinuousBackend, tokenizer, model=model, prompts=PROMPTS * 2, seed=seed, max_length=24)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len({drawn.text for drawn in first.values()}) == len(PROMPTS) * 2  # equal prompts, other texts
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_each_flag_that_narrows_sampling_reaches_greedy(
    tokenizer: PreTrainedTokenizerBase, narrow: dict[str, float]
) -> None:
    wide: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "prompts": PROMPTS[:2]}
    greedy = _draw(GenerateBackend, tokenizer, **wide, temperature=0)
    assert _draw(ContinuousBackend, tokenizer, **wide) != greedy
    assert _draw(ContinuousBackend, tokenizer, **{**wide, **narrow}) == greedy


def test_the_models_own_sampling_defaults_do_not_count(tokenizer: PreTrainedTokenizerBase) -> None:
    opinionated = _model()
    opinionated.generation_config.update(do_sample=True, temperature=0.01, top_k=2, min_p=0.9, no_repeat_ngram_size=1)
    assert _draw(ContinuousBackend, tokenizer, model=opinionated) == _draw(ContinuousBackend, tokenizer)


def test_what_is_done_is_not_drawn_and_ranks_share_the_rest(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = _draw(ContinuousBackend, tokenizer, temperature=0)
    shares = [_draw(ContinuousBackend, tokenizer, done={1}, share=(rank, 2), temperature=0) for rank in range(2)]
    assert [sorted(share) for share in shares] == [[0, 3], [2, 4]]
    assert shares[0] | shares[1] == {index: drawn for index, drawn in whole.items() if index != 1}
    assert _draw(ContinuousBackend, tokenizer, done=range(5)) == {}


def _share_of_a_process(rank: int, _gather: object, folder: Path) -> dict[int, Drawn]:
    return _draw(ContinuousBackend, load_tokenizer(str(folder)), share=(rank, 2), temperature=0)


def test_processes_of_one_launch_draw_apart(tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path) -> None:
    """The library looks at the process group, and could take it for one model in two pieces."""
    shares = run_processes(2, _share_of_a_process, tiny_model_dir)
    assert [sorted(share) for share in shares] == [[0, 2, 4], [1, 3]]
    assert shares[0] | shares[1] == _draw(ContinuousBackend, tokenizer, temperature=0)


def test_a_stop_string_ends_a_text_and_the_drawing(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = _draw(GenerateBackend, tokenizer, temperature=0)
    stop = whole[0].text[4:6]
    texts = _draw(ContinuousBackend, tokenizer, temperature=0, stop=[stop])
    assert texts[0] == Drawn(whole[0].text.partition(stop)[0], texts[0].tokens, True)
    assert texts[0].tokens < whole[0].tokens, "it was drawn to its end and cut afterwards"
    assert {index for index, drawn in texts.items() if drawn.ended} == {
        index for index, drawn in whole.items() if stop in drawn.text
    }


def test_a_text_that_stopped_is_drawn_no_further(tokenizer: PreTrainedTokenizerBase) -> None:
    """One at a time: the first must make room for the second."""
    model, passes = _model(), []
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    how: dict[str, Any] = {"model": model, "prompts": PROMPTS[:1] * 2, "batch_size": 1, "temperature": 0}
    whole = _draw(ContinuousBackend, tokenizer, **how)
    alone = len(passes) / 2
    passes.clear()
    texts = _draw(ContinuousBackend, tokenizer, **how, stop=[whole[0].text[4:6]])
    handle.remove()
    assert all(drawn.ended for drawn in texts.values())
    assert len(passes) < alone


def test_a_prompt_longer_than_a_step_and_a_cache_of_one_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt over three pages of the cache, read in pieces of 512 tokens, with one text at a time."""
    torch.manual_seed(0)
    config = _model().config
    config.max_position_embeddings = 2048
    model = type(_model())(config).eval()
    prompts = ["The cat " * 300, "The dog " * 295]
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    assert min(lengths) > 512
    how: dict[str, Any] = {"prompts": prompts, "model": model, "max_length": max(lengths) + 8, "batch_size": 1}
    continuous, plain = (_draw(kind, tokenizer, **how, temperature=0) for kind in (ContinuousBackend, GenerateBackend))
    assert continuous == plain


def test_a_length_beyond_the_model_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidArgument, match=r"^--max_length=257: .*256"):
        _draw(ContinuousBackend, tokenizer, max_length=257)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("broken kernel"), "broken kernel.*--backend hf"),
        (torch.OutOfMemoryError("CUDA out of memory"), "^--batch_size=2.*halve it"),
    ],
)
def test_a_failure_of_the_librarys_thread_ends_the_run(
    tokenizer: PreTrainedTokenizerBase, error: Exception, expected: str
) -> None:
    """`generate_batch` hands back what it has and logs the rest."""
    model = _model()

    def fail(*_: object) -> None:
        raise error

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises((RuntimeError, InvalidArgument), match=expected):
        _draw(ContinuousBackend, tokenizer, model=model)
    handle.remove()
    assert len(_draw(ContinuousBackend, tokenizer, model=model)) == len(PROMPTS)


def test_leaving_early_stops_the_librarys_thread(tokenizer: PreTrainedTokenizerBase) -> None:
    sampling = SamplingArguments("unused", max_length=200, batch_size=1)
    jobs = make_jobs(tokenizer, PROMPTS * 20, 200)
    before = threading.active_count()
    drawing = ContinuousBackend(_model(), tokenizer, sampling).draw(jobs, ())
    next(iter(drawing))
    assert threading.active_count() > before
    drawing.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
