"""What a comparison trains, in order, and the rate that it measures; tests of the program run the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tests.classifier_folders import save_bert
from utils.classification.mode_defaults import ModelRates
from utils.comparison.arguments import ChoiceArguments
from utils.comparison.run import head_rate_of, rates_of_checkpoint, trials


def rates(*, private: bool) -> ModelRates:
    return ModelRates(lambda: 0.5, lambda: 0.1 + private)


@pytest.mark.parametrize("baseline", [True, False])
def test_each_mode_is_trained_privately_and_then_without_privacy(baseline: bool) -> None:
    choice = ChoiceArguments(modes=["lora", "full", "last-layer"], rate_factors=[1.0], seeds=[3, 4], baseline=baseline)
    planned = list(trials(choice, rates))
    found = [(candidate.mode, private, seed) for candidate, private, seed in planned]
    private = (True, False) if baseline else (True,)
    assert found == [(mode, which, seed) for mode in choice.modes for which in private for seed in (3, 4)]
    for candidate, which, _ in planned:
        if candidate.mode != "lora":
            assert candidate.learning_rate == {"full": 0.1 + which, "last-layer": 0.5}[candidate.mode]


def test_a_checkpoint_without_a_pooler_measures_the_same_in_every_process(tmp_path: Path) -> None:
    """Its pooler is new, and what the head reads is the pooler's."""
    checkpoint = save_bert(tmp_path / "bert", hidden_size=4, initializer_range=0.4)
    model = AutoModel.from_pretrained(checkpoint, add_pooling_layer=False)
    model.save_pretrained(checkpoint)
    found = set()
    for seed in range(10):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.add(head_rate_of.__wrapped__(str(checkpoint)))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == 1


@pytest.mark.parametrize(("width", "private", "plain"), [(128, 3.1e-3, 1e-4), (800, 5e-4, 5e-5)])
def test_a_whole_models_rate_falls_with_its_width(tmp_path: Path, width: int, private: float, plain: float) -> None:
    checkpoint = save_bert(tmp_path / "bert", hidden_size=width)
    found = [rates_of_checkpoint(str(checkpoint), private=which).whole() for which in (True, False)]
    assert found == [private, plain]
