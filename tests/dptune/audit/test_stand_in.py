"""Units of the stand-in are orthogonal and far beyond the clip norm, and the engine clips them as the oracle says."""

from __future__ import annotations

import pytest
import torch

from dptune import InvalidArgument, Ledger, PrivateStep
from dptune.audit.stand_in import LORA, TRAINED, WHOLE, StandIn
from dptune.clipping_styles import FLAT, Automatic, Clipping, PerLayer
from dptune.lora import trainable_parameters
from tests.private_sum import NoNoise, config_for

UNITS, CLIP_NORM = 12, 0.3


@pytest.mark.parametrize("clipping", [FLAT, PerLayer(), Automatic()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("trained", TRAINED)
def test_the_engine_sums_what_the_oracle_says(trained: str, clipping: Clipping, tmp_path) -> None:
    model = StandIn(UNITS, trained, clipping, CLIP_NORM)
    wanted = model.contributions()
    parameters = trainable_parameters(model)
    config = config_for(UNITS, clip_norm=CLIP_NORM)
    object.__setattr__(config, "clipping", clipping)
    size = sum(one.numel() for one in parameters)
    with PrivateStep(model, config, ledger=Ledger(tmp_path / "ledger.jsonl"), noise=NoNoise(size)) as step:
        stats = step.backward(model(torch.tensor([3, 7])))
        step.finish()
    found = torch.cat([one.grad.flatten().double() for one in parameters]) * config.divisor / CLIP_NORM
    assert (found - wanted[3] - wanted[7]).norm() < 1e-5
    assert stats.norms.min() > 100 * CLIP_NORM


@pytest.mark.parametrize("trained", TRAINED)
def test_contributions_are_orthogonal_and_of_norm_one(trained: str) -> None:
    directions = StandIn(UNITS, trained, FLAT, CLIP_NORM).contributions()
    assert torch.allclose(directions @ directions.T, torch.eye(UNITS, dtype=torch.float64), atol=1e-6)


def test_nearly_all_of_a_gradient_lies_at_home() -> None:
    model = StandIn(UNITS, WHOLE, FLAT, CLIP_NORM)
    named = [(name, one.numel()) for name, one in model.named_parameters() if one.requires_grad]
    for unit, own in enumerate(model.contributions()):
        parts = dict(zip([name for name, _ in named], own.split([size for _, size in named]), strict=True))
        home = "embedding" if model.home_of(unit) == "head" else model.home_of(unit)  # their weights are tied
        share = sum(float(part.square().sum()) for name, part in parts.items() if home in name)
        assert share > 0.9
    assert {model.home_of(unit) for unit in range(UNITS)} == set(model.layers)


def test_the_weights_are_the_same_each_time_and_torch_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    ones, others = (StandIn(4, LORA, FLAT, 1.0).state_dict() for _ in range(2))
    assert all(torch.equal(ones[name], others[name]) for name in ones)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="trained='half': give one of lora, whole"):
        StandIn(4, "half", FLAT, 1.0)
