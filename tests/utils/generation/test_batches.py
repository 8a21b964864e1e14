"""Prompts as in training, and batches that hold every text once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import CORPUS, tiny_tokenizer
from tests.tokenizer_kinds import slow_bytes, slow_pieces
from utils.data.prompts import format_prompt
from utils.data.record import RecordMaker, prompt_and_answer
from utils.data.special_tokens import MarkedText
from utils.data.tokenization import tokenize
from utils.generation import batches as generation_batches
from utils.generation.batches import TextJob, batch_seed, encode_prompt, make_jobs, plan_batches
from utils.generation.run import make_prompts
from utils.models.loading import load_tokenizer

PROMPTS = ["Abstract: ", "Hello, how are you?\n", "The cat sat on the mat. A dog ran over the hill.\n", "a\n\n"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


def _metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are part of the next piece, one is put in front, line breaks are pieces, <s> is added."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([*CORPUS, "line\nbreak"], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _trimming_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's and Llama 3's: offsets leave out the spaces of a token, and runs of line breaks are merged."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens(AddedToken("<|assistant|>", special=True))
    return tokenizer


def _merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a token for two line breaks, which it uses at the end of a text only."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*CORPUS, "a\n\n\n", "b\n\n\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


TOKENIZERS = [tiny_tokenizer, _metaspace_tokenizer, _trimming_tokenizer, _merging_tokenizer]


@cache
def _made(make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make()


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize(
    "prompt", ["", *PROMPTS, "Two spaces:  ", "x \n", "a\n\n\n", "<|assistant|>\n", format_prompt("Why?", "vicuna")]
)
@pytest.mark.parametrize("answer", ["The patients were given a placebo.", "We report"])
def test_a_prompt_is_the_tokens_before_the_answer_in_training(
    make: Callable[[], PreTrainedTokenizerFast], prompt: str, answer: str
) -> None:
    tokenizer = _made(make)
    trained = tokenize([prompt_and_answer(prompt, answer)], tokenizer, block_size=512)
    before_answer = trained.ids[: int(trained.is_answer.argmax())].tolist()
    # Several spaces in front of an answer may be apart in training: the model then writes the ones that were left out.
    ids = encode_prompt(tokenizer, prompt)
    assert ids == before_answer if not prompt.endswith("  ") else before_answer[: len(ids)] == ids


def test_some_prompts_are_other_tokens_alone_than_before_an_answer() -> None:
    """Else the test above would pass with tokenizers that show no difference."""
    merging = _merging_tokenizer()
    assert merging("a\n\n\n").input_ids != encode_prompt(merging, "a\n\n\n")
    assert tiny_tokenizer()("Abstract: ").input_ids != encode_prompt(tiny_tokenizer(), "Abstract: ")


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("style", ["plain", "vicuna"])
@pytest.mark.parametrize("asked", ["a</s>b", "<s> Hi </s>", "</s>"])
def test_a_special_token_in_an_instruction_is_text_in_training_and_in_sampling(
    make: Callable[[], PreTrainedTokenizerFast], style: str, asked: str
) -> None:
    tokenizer = _made(make)
    trained = tokenize([RecordMaker(tokenizer, style).instructed(asked, "We report")], tokenizer, block_size=512)
    (prompt,) = make_prompts([asked], style, tokenizer)
    ids = encode_prompt(tokenizer, prompt)
    assert ids == trained.ids[: int(trained.is_answer.argmax())].tolist()
    assert tokenizer.eos_token_id not in ids
    (job,) = make_jobs(tokenizer, [prompt], 512)
    assert (job.prompt, list(job.ids)) == (prompt.text, ids)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_rendered_prompt_keeps_its_special_tokens_and_one_start_token(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = _made(make)
    (prompt,) = make_prompts(["<s>Hi</s>Bye:"], "as_is", tokenizer)
    ids = encode_prompt(tokenizer, prompt)
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
    assert ids == encode_prompt(tokenizer, "<s>Hi</s>Bye:")


def test_an_empty_prompt_is_the_token_that_begins_a_text() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    assert encode_prompt(_metaspace_tokenizer(), "") == [1]
    tokenizer.bos_token = None
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]


def test_a_prompt_that_merges_with_the_answers_letter_keeps_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer("Abstract").input_ids) == 1
    monkeypatch.setattr(generation_batches, "_ANSWER_START", "t")
    assert tokenizer.decode(encode_prompt(tokenizer, "Abstrac")) == "Abstrac"


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    length = len(encode_prompt(tokenizer, PROMPTS[2]))
    assert len(make_jobs(tokenizer, PROMPTS, length + 1)) == 4
    with pytest.raises(InvalidArgument, match=f"^--max_length={length}: prompt 3 of 4 alone has {length} tokens"):
        make_jobs(tokenizer, PROMPTS, length)


def _jobs(lengths: Sequence[int]) -> list[TextJob]:
    return [TextJob(index, "", (5,) * length) for index, length in enumerate(lengths)]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("spread", [0, 4, 1000])
def test_batches_hold_every_job_once_within_size_and_spread(batch_size: int, spread: int) -> None:
    lengths = [random.Random(spread).randint(1, 12) for _ in range(50)]
    batches = plan_batches(_jobs(lengths), batch_size, spread)
    assert sorted(job.index for batch in batches for job in batch) == list(range(50))
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(len(batch[0].ids) - len(batch[-1].ids) <= spread for batch in batches)
    firsts = [len(batch[0].ids) for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
    if spread == 1000:
        assert len(batches) == -(-50 // batch_size)


def test_every_batch_and_seed_has_random_numbers_of_its_own() -> None:
    jobs = _jobs([4] * 40)
    batches = [batch for size in (3, 4, 8) for batch in plan_batches(jobs, size, 0) if len(batch) == size]
    seeds = [batch_seed(seed, batch) for seed in range(3) for batch in batches]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("make", [slow_bytes, slow_pieces])
def test_a_tokenizer_that_cannot_keep_typed_special_tokens_apart_is_refused(make, tmp_path: Path) -> None:
    slow = make(tmp_path)
    prompts = [MarkedText("a cat"), MarkedText("a</s>b"), MarkedText("a</s>b", ((1, 5),))]
    assert len(make_jobs(slow, prompts[:2], 99)) == 2
    with pytest.raises(InvalidArgument, match=r"--model_name_or_path=.* of the text of prompt 3; change the prompt"):
        make_jobs(slow, prompts, 99)
