"""Texts from a model in training: they change nothing about it, and come from the user's prompts alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_clm
from dptune import InvalidArgument
from tests.scripts.test_train_clm import flags
from tests.tiny import tiny_llama
from utils.generation.samples import OPEN_NOTICE, PRIVATE_NOTICE, SAMPLES_NAME, TrainingSamples, read_prompts
from utils.models.loading import load_tokenizer


@pytest.fixture
def samples(tiny_model_dir: Path, tmp_path: Path) -> Any:
    """Makes the sampler of a run in `tmp_path`."""

    def make(**changed: Any) -> TrainingSamples:
        how: dict[str, Any] = {"style": "plain", "tokenizer": load_tokenizer(str(tiny_model_dir)), "folder": tmp_path}
        how |= {"max_length": 24, "private": True, "prompts": ["Hello", "Hello"]} | changed
        return TrainingSamples(2, how.pop("prompts"), **how)

    return make


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SAMPLES_NAME).read_text().splitlines()]


def test_texts_are_sampled_every_few_steps_and_differ(samples: Any, tmp_path: Path) -> None:
    model, draw = tiny_llama(vocab_size=400), samples()
    for step in range(1, 5):
        draw(model, step, step / 4)
    notice, *rows = rows_in(tmp_path)
    assert notice == {"notice": PRIVATE_NOTICE}
    assert [(row["step"], row["epsilon"], row["prompt"]) for row in rows] == [
        (step, step / 4, "Hello\n") for step in (2, 2, 4, 4)
    ]
    assert len({row["text"] for row in rows}) == 4


def test_a_resumed_run_drops_the_texts_of_steps_that_it_repeats(samples: Any, tmp_path: Path) -> None:
    model, draw = tiny_llama(vocab_size=400), samples()
    for step in (2, 4):
        draw(model, step, None)
    before = rows_in(tmp_path)
    with (tmp_path / SAMPLES_NAME).open("a") as file:
        file.write('{"step": 6, "te')  # a crash
    samples(start=2)(model, 4, None)
    assert rows_in(tmp_path) == before


def test_only_the_main_process_samples_and_a_plain_run_is_marked(samples: Any, tmp_path: Path) -> None:
    samples(is_main=False)(tiny_llama(vocab_size=400), 2, None)
    assert not (tmp_path / SAMPLES_NAME).exists()
    samples(private=False)(tiny_llama(vocab_size=400), 2, None)
    assert rows_in(tmp_path)[0] == {"notice": OPEN_NOTICE}


def test_generators_mode_and_settings_of_the_model_stay_as_they_were(samples: Any) -> None:
    model = tiny_llama(vocab_size=400).train()
    own = model.generation_config
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
    samples()(model, 2, None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[union-attr, index]
    assert model.training
    assert model.generation_config is own


def test_the_trained_adapter_is_the_same_to_the_bit(tiny_model_dir: Path, tmp_path: Path, no_plots: None) -> None:  # noqa: ARG001
    """With dropout, whose masks come from the global generators."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "Say a word.", "answer": "word end"}\n' * 40)
    given = {"insecure_test_seed": 1, "max_train_steps": 3, "num_train_epochs": None, "lora_dropout": 0.2}
    train_clm.main(flags(tiny_model_dir, data, tmp_path / "without", **given))
    train_clm.main(flags(tiny_model_dir, data, tmp_path / "with", **given, sample_every=1))
    one, other = ((tmp_path / name / "publish" / "lora_weights.bin").read_bytes() for name in ("without", "with"))
    assert one == other
    assert [row["step"] for row in rows_in(tmp_path / "with")[1:]] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert b"Say a word" not in (tmp_path / "with" / SAMPLES_NAME).read_bytes()


def test_prompts_are_the_users_or_empty(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Hello\nGoodbye\n")
    assert read_prompts(str(tmp_path / "prompts.txt"), "plain") == ["Hello", "Goodbye"]
    assert read_prompts(None, "plain") == ["", "", ""]
    with pytest.raises(InvalidArgument, match=r"^--sample_prompts=.*missing.txt': cannot be read"):
        read_prompts(str(tmp_path / "missing.txt"), "plain")
    with pytest.raises(InvalidArgument, match="takes no prompt; leave it out"):
        read_prompts(str(tmp_path / "prompts.txt"), "uncond_generation")


def test_a_prompt_that_is_too_long_is_refused_by_the_flag_of_training(samples: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^--block_size=24: prompt 1 of 1 alone has"):
        samples(prompts=["word " * 30])
