"""From flags to a plan, and what is printed about data and memory."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from dptune import InvalidArgument
from dptune.bands import KEPT_BYTES
from dptune.lora import add_lora
from dptune.sampling import Parts
from dptune.shapes import Shapes
from dptune.units.unit import EXAMPLE_LEVEL, PrivacyUnit, group_by_author
from tests.tasks import rows
from tests.tiny import tiny_llama
from tests.utils.models.test_memory import GIB, SHAPE, build, sizes_of
from tests.whole_models import CAUSAL
from utils.models.memory import MemoryNeeds, MemorySettings, describe_memory, memory_needs
from utils.models.whole_memory import WholeNeeds
from utils.training.optimization_arguments import OptimizationArguments
from utils.training.plan import (
    describe_clipping,
    describe_data,
    describe_model,
    describe_most_passes,
    needs_of,
    num_sampled,
    plan_run,
)
from utils.training.privacy_flags import PrivacyFlags

PRIVACY: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
AUTHORS = group_by_author(["a", "a", "b", None, "a", "b", "b", "b", "c", "c"])


def optimization(**changed: Any) -> OptimizationArguments:
    return OptimizationArguments(per_device_train_batch_size=4, gradient_accumulation_steps=2, **changed)


def test_the_batch_is_over_all_processes_and_steps_cover_the_epochs() -> None:
    plan = plan_run(PrivacyFlags(**PRIVACY), optimization(num_train_epochs=3), num_examples=100, world_size=2)
    assert (plan.expected_batch_size, plan.steps) == (16, 19)
    given = plan_run(PrivacyFlags(**PRIVACY), optimization(max_train_steps=7), num_examples=100, world_size=2)
    assert given.steps == 7


def test_memory_is_estimated_for_adapters_and_for_whole_models() -> None:
    settings = MemorySettings(torch.float32, 512, 128)
    whole = tiny_llama()
    needs = needs_of(whole)
    assert needs is not None
    assert isinstance(needs(settings), WholeNeeds)
    assert needs_of(whole.requires_grad_(False)) is None, "nothing is trained"
    add_lora(whole, rank=2, alpha=4, targets=["q_proj"])
    needs = needs_of(whole)
    assert needs is not None
    assert isinstance(needs(settings), MemoryNeeds)


def test_without_privacy_there_is_no_mechanism() -> None:
    flags = PrivacyFlags(clip_norm=-1, noise_multiplier=-1)
    assert plan_run(flags, optimization(max_train_steps=7), num_examples=100, world_size=1).privacy is None


def test_bounded_authors_are_accounted_as_groups() -> None:
    flags = PrivacyFlags(**PRIVACY, privacy_unit="user", user_level_method=EXAMPLE_LEVEL, examples_per_unit=3)
    plan = plan_run(flags, optimization(max_train_steps=7), num_examples=100, world_size=1)
    assert plan.privacy is not None
    assert plan.privacy.group_size == 3


def test_weights_raise_the_probability_that_is_accounted() -> None:
    flags, steps, parts = PrivacyFlags(**PRIVACY), optimization(max_train_steps=7), Parts((60, 40), (1.0, 3.0))
    plan = plan_run(flags, steps, num_examples=100, world_size=1, parts=parts)
    assert plan.privacy is not None
    assert plan.privacy.sampling_probability == pytest.approx(8 / 60)
    with pytest.raises(InvalidArgument, match="more than the 60 that these weights allow"):
        plan_run(flags, steps, num_examples=100, world_size=8, parts=parts)


def test_a_batch_of_more_authors_than_there_are_is_refused() -> None:
    flags = PrivacyFlags(**PRIVACY, privacy_unit="user", examples_per_unit=2)
    with pytest.raises(InvalidArgument, match="a batch of 8, more than the 5 authors"):
        plan_run(flags, optimization(max_train_steps=7), num_examples=5, world_size=1)


def test_rows_or_authors_are_counted() -> None:
    data = rows()
    assert num_sampled(PrivacyUnit(), data) == 10
    by_author = dataclasses.replace(data, authors=AUTHORS)
    assert num_sampled(PrivacyUnit("user", examples=2), by_author) == 4
    assert num_sampled(PrivacyUnit("user", EXAMPLE_LEVEL, examples=2), by_author) == 10
    with pytest.raises(RuntimeError, match="without the column"):
        num_sampled(PrivacyUnit("user", examples=2), data)


def test_data_are_described_with_what_is_lost() -> None:
    data = rows()
    is_answer = data.is_answer & (np.arange(len(data.ids)) >= data.starts[2])
    lossy = dataclasses.replace(data, is_answer=is_answer, num_cut=3, authors=AUTHORS)
    text = "\n".join(describe_data(lossy, None))
    lost = ("3 examples cut", "2 examples with nothing to learn")
    for told in ("4 with 10 examples", "the largest author has 4 rows", *lost):
        assert told in text
    assert "no validation data" in text
    assert describe_data(data, data)[-1] == f"held out               10 examples, {int(data.lengths.sum()):,} tokens"


def test_the_plan_tells_parameters_and_memory() -> None:
    model = build(LlamaConfig(**SHAPE))
    lines = describe_model(model, MemorySettings(torch.float32, 512, 128), 8 * GIB)
    assert lines[0].startswith("trainable parameters   ")
    assert lines[1:] == describe_memory(
        partial(memory_needs, sizes_of(model)), MemorySettings(torch.float32, 512, 128), 8 * GIB
    )


def test_a_model_without_decoder_layers_is_not_estimated() -> None:
    model = build(LlamaConfig(**SHAPE))
    model._no_split_modules = None
    assert "not estimated" in describe_model(model, MemorySettings(torch.float32, 512, 512))[1]


def test_a_whole_models_memory_is_estimated_and_shared_by_its_ranks() -> None:
    """With the settings that would fit."""
    model, settings = CAUSAL["Llama"](), MemorySettings(torch.float32, 512, 512)
    lines = describe_model(model, settings, 1 << 20)
    assert "(100.000%)" in lines[0]
    assert "at the peak (estimated)" in lines[1]
    assert "does not fit" in lines[-1]
    shared = describe_model(model, replace(settings, sharded=True, world_size=4))
    assert shared[1] != lines[1]


def test_a_model_of_which_a_part_is_trained_is_told_by_its_weights_alone() -> None:
    model = CAUSAL["Llama"]()
    model.lm_head.weight.requires_grad_(False)
    alone = describe_model(model, MemorySettings(torch.float32, 512, 512))[1]
    assert alone.endswith("without activations")
    assert describe_model(model, MemorySettings(torch.float32, 512, 512), 8 * GIB)[1] == alone
    short = describe_model(model, MemorySettings(torch.float32, 512, 512), 1000)[1]
    assert short == f"{alone}; does not fit: the device has 0.0 GiB"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = 4 * (sum(parameter.numel() for parameter in model.parameters()) + 3 * trained)
    kept = MemorySettings(torch.float32, 512, 512, keeps_average=True)
    assert "does not fit" in describe_model(model, kept, needed)[1]
    assert "does not fit" not in describe_model(model, replace(kept, keeps_average=False), needed)[1]


@pytest.mark.parametrize(("norm", "told"), [(1.0, "a step's gradient to norm 1"), (0.0, "none")])
def test_clipping_without_privacy_is_told(norm: float, told: str) -> None:
    settings = optimization(max_train_steps=7, max_grad_norm=norm)
    plain = plan_run(PrivacyFlags(clip_norm=-1, noise_multiplier=-1), settings, num_examples=100, world_size=1)
    assert describe_clipping(plain, settings) == [f"gradient clipping      {told}"]
    private = plan_run(PrivacyFlags(**PRIVACY), settings, num_examples=100, world_size=1)
    assert describe_clipping(private, settings) == []


def test_a_plan_of_cut_draws_tells_the_most_forward_passes() -> None:
    steps, shapes = optimization(max_train_steps=7), Shapes(48, 96, 8.0, masked=False)
    cut, plain = (
        plan_run(PrivacyFlags(**PRIVACY, max_batch=most), steps, num_examples=100, world_size=1) for most in (14, None)
    )
    assert cut.privacy is not None
    assert cut.privacy.max_batch == 14
    (told,) = describe_most_passes(cut, shapes, ranks=2)
    assert f"at most {shapes.most_passes(14, ranks=2)} per step on each process" in told
    assert describe_most_passes(plain, shapes, ranks=2) == []


@pytest.mark.parametrize(
    ("most", "told"),
    [(0, "--max_batch=0: "), (7, "max_batch=7: most draws would be cut; give at least the expected batch size, 8")],
)
def test_a_maximum_below_the_average_batch_is_refused(most: int, told: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{told}"):
        plan_run(
            PrivacyFlags(**PRIVACY, max_batch=most), optimization(max_train_steps=7), num_examples=100, world_size=1
        )


def test_automatic_noise_bands_keep_no_more_noise_than_there_is_room_for() -> None:
    flags = PrivacyFlags(clip_norm=1.0, target_epsilon=8.0, delta=1e-5)
    settings = optimization(max_train_steps=16)
    few, many = (
        plan_run(flags, settings, num_examples=2000, world_size=1, trained=trained).privacy
        for trained in (1000, KEPT_BYTES)
    )
    assert few is not None
    assert many is not None
    assert few.noise_bands > 1 == many.noise_bands


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    flags = PrivacyFlags(**PRIVACY)
    plan_run(flags, optimization(max_train_steps=4, num_warmup_steps=3), num_examples=100, world_size=1)
    with pytest.raises(
        InvalidArgument, match=r"^--num_warmup_steps=4: the run has 4 steps, so its learning rate would"
    ):
        plan_run(flags, optimization(max_train_steps=4, num_warmup_steps=4), num_examples=100, world_size=1)
