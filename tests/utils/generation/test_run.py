"""Sampling: batches that do not show in the texts, runs that continue where they stopped."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dptune._validate import InvalidArgument
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.utils.data.test_template_date import TELLING, set_clock
from utils.generation import hf as generation_hf
from utils.generation.arguments import AdapterArguments, SamplingArguments
from utils.generation.backends import Drawn, drawn_from, sampling_config
from utils.generation.batches import TextJob, encode_prompt, make_jobs
from utils.generation.files import append_generations, generation_journal
from utils.generation.hf import GenerateBackend, draw_batch, max_spread
from utils.generation.run import generate_all, make_prompts, prompts_date
from utils.models.loading import load_tokenizer

IDENTITY = {"model": "tiny", "top_p": 0.9}
PROMPTS = ["Abstract: ", "Hello, how are you?\n", "The cat sat on the mat. A dog ran over the hill.\n", "a\n\n"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A tiny Llama that seldom ends a text: its end token's logit is always 0."""
    model = tiny_llama(vocab_size=400)
    with torch.no_grad():
        model.lm_head.weight[2] = 0
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


def _sampling(tmp_path: Path, **kwargs: Any) -> SamplingArguments:
    return SamplingArguments(**{"output_dir": str(tmp_path / "out"), "max_length": 40, "batch_size": 3, **kwargs})


def _draw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], seed: int = 0, **kwargs: Any
) -> list[Drawn]:
    sampling = SamplingArguments(output_dir="unused", **kwargs)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    config = sampling_config(model, tokenizer, sampling)
    return draw_batch(model, tokenizer, ids, config, max_length=sampling.max_length, seed=seed)


def test_an_instruction_that_the_template_refuses_is_named_by_its_number_and_not_shown() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 1 // (messages[0].content | length - 6) }}"
    told = "--prompt_style='chat': instruction 2: the chat template fails on this conversation .ZeroDivisionError."
    with pytest.raises(InvalidArgument, match=told) as caught:
        make_prompts(["open", "secret"], "chat", tokenizer)
    assert "secret" not in str(caught.value)


def test_prompts_tell_the_date_of_the_training_or_of_the_first_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    assert prompts_date(tokenizer, "m", AdapterArguments(), _sampling(tmp_path)) is None
    tokenizer.chat_template = TELLING
    set_clock(monkeypatch, "2026-02-02T01:00:00")

    def day(trained: Path | None = None, **given: Any) -> str | None:
        adapter = AdapterArguments(None if trained is None else str(trained / "lora_weights.bin"))
        return prompts_date(tokenizer, "m", adapter, _sampling(tmp_path, **given))

    assert day() == "2026-02-02"
    folder = Path(_sampling(tmp_path).output_dir)
    generation_journal(folder).claim({"template_date": "2026-02-01"})
    append_generations(folder, 0, [{"prompt": "a", "text": "b", "index": 0, "ended": True}])
    assert day() == "2026-02-01"
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "run_config.json").write_text('{"template_date": "2026-01-31"}')
    assert day(tmp_path / "trained") == "2026-01-31"
    assert day(tmp_path / "trained", template_date="2026-01-01") == "2026-01-01"


def test_neighbours_in_a_batch_do_not_change_a_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    together = _draw(model, tokenizer, PROMPTS, temperature=0, max_length=45)
    alone = [_draw(model, tokenizer, [prompt], temperature=0, max_length=45)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({drawn.text for drawn in together}) == len(PROMPTS)


def test_max_length_counts_each_prompt_and_its_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = _draw(model, tokenizer, PROMPTS, temperature=0, max_length=45)
    assert [one.tokens for one in drawn] == [45 - len(encode_prompt(tokenizer, prompt)) for prompt in PROMPTS]
    assert not any(one.ended for one in drawn)


def test_a_text_ends_at_any_end_token_of_model_or_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[0])])
    plain = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=2)
    greedy = model.generate(ids, generation_config=plain, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
    stop = next(token for token in greedy.tolist() if token != greedy[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, stop])
    (drawn,) = _draw(model, tokenizer, PROMPTS[:1], temperature=0, max_length=45)
    assert sampling_config(model, tokenizer, SamplingArguments("x")).eos_token_id == sorted([1, 2, stop])
    assert drawn.ended
    assert drawn.tokens == greedy.tolist().index(stop) + 1
    assert drawn.text == tokenizer.decode(greedy[: drawn.tokens - 1]).lstrip()


def test_the_space_before_the_first_word_is_not_in_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*tokenizer(" The patients").input_ids, 2, 2, 2]
    assert drawn_from(tokenizer, ids, [2], ()) == Drawn("The patients", len(ids) - 2, True)


def test_sampling_follows_its_seed_and_leaves_the_global_generator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    state = torch.get_rng_state()
    first, again, other = (_draw(model, tokenizer, PROMPTS, seed=seed, max_length=45) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_each_flag_that_narrows_sampling_reaches_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, narrow: dict[str, float]
) -> None:
    wide: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "max_length": 30}
    greedy = _draw(model, tokenizer, PROMPTS[:1], **wide, temperature=0)
    assert _draw(model, tokenizer, PROMPTS[:1], **wide) != greedy
    assert _draw(model, tokenizer, PROMPTS[:1], **{**wide, **narrow}) == greedy


def test_a_repetition_penalty_changes_the_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    plain, penalised = (
        _draw(model, tokenizer, PROMPTS[:1], temperature=0, max_length=45, repetition_penalty=penalty)
        for penalty in (1.0, 5.0)
    )
    assert plain != penalised


def test_the_models_own_sampling_defaults_do_not_count(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    plain, opinionated = tiny_llama(vocab_size=400), tiny_llama(vocab_size=400)
    opinionated.generation_config.update(do_sample=True, temperature=0.01, top_k=2, min_p=0.9, no_repeat_ngram_size=1)
    jobs = make_jobs(tokenizer, PROMPTS, 40)
    paths = [
        _generate(one, tokenizer, jobs, _sampling(tmp_path / name), identity=IDENTITY)
        for name, one in (("plain", plain), ("opinionated", opinionated))
    ]
    assert paths[0].read_text() == paths[1].read_text()


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TextJob],
    sampling: SamplingArguments,
    **kwargs: Any,
) -> Path:
    return generate_all(GenerateBackend(model, tokenizer, sampling), jobs, sampling, **kwargs)[0]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_every_text_in_order(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    jobs = make_jobs(tokenizer, PROMPTS * 3, 40)
    path = _generate(model, tokenizer, jobs, _sampling(tmp_path, batch_size=2), identity=IDENTITY)
    rows = _read(path)
    assert [row["index"] for row in rows] == list(range(12))
    assert [row["prompt"] for row in rows] == PROMPTS * 3
    assert all(set(row) == {"prompt", "text", "index", "ended"} for row in rows)
    assert len({row["text"] for row in rows}) == 12  # the same prompt never gets the same random numbers
    assert sorted(one.name for one in path.parent.iterdir()) == ["generation_config.json", "generations.jsonl"]


def test_a_run_that_was_torn_continues_to_the_same_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, sampling = make_jobs(tokenizer, PROMPTS * 3, 40), _sampling(tmp_path)
    final = _generate(model, tokenizer, jobs, sampling, identity=IDENTITY)
    whole = final.read_bytes()
    # What is left of two ranks: five rows of one, two of the other and a piece of a third.
    lines = whole.splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    final.unlink()
    (final.parent / "generations.rank0.jsonl").write_bytes(b"".join(lines[:5]))
    (final.parent / "generations.rank1.jsonl").write_bytes(b"".join(lines[5:7]) + lines[7][:-9])
    drawn: list[int] = []
    monkeypatch.setattr(generation_hf, "draw_batch", _counted(drawn))
    _generate(model, tokenizer, jobs, sampling, identity=IDENTITY)
    assert final.read_bytes() == whole
    assert 5 <= sum(drawn) < 12
    drawn.clear()
    _generate(model, tokenizer, jobs, sampling, identity=IDENTITY)
    assert final.read_bytes() == whole
    assert drawn == []


def test_a_run_continued_with_another_batch_size_keeps_what_it_has(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    jobs = make_jobs(tokenizer, PROMPTS[:1] * 6, 30)
    final = _generate(model, tokenizer, jobs, _sampling(tmp_path, max_length=30), identity=IDENTITY)
    kept = final.read_bytes().splitlines(keepends=True)[:4]
    final.unlink()
    (final.parent / "generations.rank0.jsonl").write_bytes(b"".join(kept))
    continued = _sampling(tmp_path, max_length=30, batch_size=6)
    rows = _read(_generate(model, tokenizer, jobs, continued, identity=IDENTITY))
    assert rows[:4] == [json.loads(line) for line in kept]
    assert [row["index"] for row in rows] == list(range(6))
    assert len({row["text"] for row in rows}) == 6


def _counted(drawn: list[int]) -> Callable[..., list[Drawn]]:
    """`draw_batch` that notes the size of each batch in `drawn`."""

    def count(*args: Any, **kwargs: Any) -> list[Drawn]:
        drawn.append(len(args[2]))
        return draw_batch(*args, **kwargs)

    return count


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_without_overlap(
    world: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks as threads with a real barrier; each text names the seed it was drawn with."""
    taken: list[int] = []

    def draw(
        _model: object, _tokenizer: object, prompts: Sequence[object], _config: object, **kwargs: int
    ) -> list[Drawn]:
        taken.append(len(prompts))
        return [Drawn(f"{kwargs['seed']} {place}", 1, False) for place, _ in enumerate(prompts)]

    monkeypatch.setattr(generation_hf, "draw_batch", draw)
    jobs = make_jobs(tokenizer, PROMPTS * 5, 40)
    single = _generate(model, tokenizer, jobs, _sampling(tmp_path / "single"), identity=IDENTITY)
    taken.clear()
    barrier = threading.Barrier(world, timeout=20)

    def run(rank: int) -> None:
        share: dict[str, Any] = {"rank": rank, "world": world, "wait": barrier.wait}
        _generate(model, tokenizer, jobs, _sampling(tmp_path / "shared"), identity=IDENTITY, **share)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "shared/out/generations.jsonl").read_bytes() == single.read_bytes()
    assert sum(taken) == 20


def test_a_batch_beyond_memory_names_the_batch_size(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation_hf, "draw_batch", fail)
    with pytest.raises(InvalidArgument, match=r"^--batch_size=3: .*halve it"):
        _generate(model, tokenizer, [TextJob(0, "", (5, 5, 5))], _sampling(tmp_path), identity=IDENTITY)


def test_a_length_beyond_the_model_is_refused_before_anything_is_written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=r"^--max_length=257: .*256"):
        _generate(model, tokenizer, [TextJob(0, "", (5, 5, 5))], _sampling(tmp_path, max_length=257), identity=IDENTITY)
    assert not (tmp_path / "out").exists()


def test_lengths_mix_only_as_far_as_the_models_positions_and_the_penalty_let_them(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    assert max_spread(model, _sampling(tmp_path, max_length=200)) == 56
    assert max_spread(model, _sampling(tmp_path, max_length=256)) == 0
    assert max_spread(model, _sampling(tmp_path, max_length=200, repetition_penalty=1.1)) == 0
