"""The neighbour test: removing any one example changes the noiseless global sum by at most C.

This is the sensitivity that the noise is scaled to. If this test fails, every printed epsilon is false. Three
deliberately broken variants show that it can fail.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dptune import PrivacyConfig, add_lora, deal
from tests.examples import random_examples, randomise_adapters
from tests.private_sum import config_for, private_sum
from tests.tiny import tiny_llama

ROUNDING = 1e-5  # float32 sums of a few gradients


def moved(model, examples, config, without: int, **variant) -> float:
    """Change of the released sum without the example `without`, in units of the clip norm."""
    everyone = list(range(len(examples)))
    others = [index for index in everyone if index != without]
    with_it = private_sum(model, examples, everyone, config, **variant)
    without_it = private_sum(model, examples, others, config, **variant)
    return ((with_it - without_it).norm() / config.clip_norm).item()


def adapted(seed: int, targets=("q_proj", "v_proj", "o_proj")):
    model = tiny_llama(seed, vocab_size=60, hidden=16, layers=1)
    add_lora(model, rank=2, alpha=4.0, targets=targets)
    randomise_adapters(model, seed, scale=0.3)
    return model


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 9),
    longest=st.integers(3, 30),
    clip_norm=st.floats(1e-3, 10.0),
    token_budget=st.integers(1, 200),
    without=st.integers(0, 8),
    head=st.booleans(),
)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(
    seed, count, longest, clip_norm, token_budget, without, head
):
    model = adapted(seed, ("q_proj", "lm_head") if head else ("q_proj", "v_proj", "o_proj"))
    examples = random_examples(count, seed=seed, vocab_size=60, longest=longest)
    config = config_for(count, clip_norm=clip_norm)
    assert moved(model, examples, config, without % count, token_budget=token_budget) <= 1 + ROUNDING


def averaged_over_tokens(model, ids, labels):
    """The loss that models return, the mean over all labelled tokens of the micro-batch, divided among the rows."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return nll.sum(1) / labels[:, 1:].ne(-100).sum() * len(ids)


def counting_the_first_twice(draw, lengths, **kwargs):
    dealt = deal(draw, lengths, **kwargs)
    return [[np.concatenate([part, part[:1]]) for part in parts] for parts in dealt]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DividedByTheNumberDrawn(PrivacyConfig):
    """Broken: divides by the number of drawn rows, which is six in `moved`'s first step and five in its second."""

    drawn: list[float] = dataclasses.field(default_factory=lambda: [6.0, 5.0])

    @property
    def divisor(self) -> float:
        return self.drawn.pop(0)


def one_long_answer_among_short_ones():
    """Six rows of 20 tokens: one with 19 labels, and five equal ones with one label each, whose gradients add up."""
    (long, _), (short, _) = random_examples(2, seed=3, vocab_size=60, shortest=20, longest=20)
    return [(long, [-100, *long[1:]])] + [(short, [-100] * 19 + short[19:])] * 5


def worst_move(config_type=PrivacyConfig, **variant) -> float:
    """The maximum change over all examples and a range of clip norms, with all six rows in one micro-batch."""
    examples, worst = one_long_answer_among_short_ones(), 0.0
    for clip_norm in (0.01, 0.1, 1.0):
        for without in range(6):
            settings = vars(config_for(6, clip_norm=clip_norm, expected_batch_size=6.0))
            worst = max(
                worst, moved(adapted(5), examples, config_type(**settings), without, token_budget=120, **variant)
            )
    return worst


def test_the_bound_is_met_and_tight():
    assert worst_move() == pytest.approx(1, rel=ROUNDING)


@pytest.mark.parametrize(
    ("config_type", "variant"),
    [
        pytest.param(PrivacyConfig, {"losses": averaged_over_tokens}, id="loss averaged over the micro-batch"),
        pytest.param(DividedByTheNumberDrawn, {}, id="divisor is the number drawn"),
        pytest.param(PrivacyConfig, {"cut": counting_the_first_twice}, id="example counted twice"),
    ],
)
def test_a_broken_variant_breaks_the_bound(config_type, variant):
    with pytest.raises(AssertionError):
        assert worst_move(config_type, **variant) <= 1 + ROUNDING


def test_an_example_without_a_labelled_token_contributes_exactly_nothing():
    model, examples = adapted(1), random_examples(4, vocab_size=60)
    ids, labels = examples[2]
    examples[2] = (ids, [-100] * len(labels))
    config = config_for(4, clip_norm=1.0)
    with_it = private_sum(model, examples, [0, 1, 2, 3], config)
    without_it = private_sum(model, examples, [0, 1, 3], config)
    assert torch.linalg.vector_norm(with_it) > 0
    torch.testing.assert_close(with_it, without_it, rtol=1e-5, atol=1e-7)
    only = private_sum(model, examples, [2], config)
    assert not only.any()
