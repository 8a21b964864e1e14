"""Every style of clipping: its sum equals a few lines of float64, and one example changes the release by at most the
sensitivity that the configuration states."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument, Ledger, PrivacyConfig, PrivateStep
from dptune.accounting import Spend, epsilon
from dptune.clipping import Clipper, layers_of
from dptune.clipping_styles import FLAT, Adaptive, Automatic, Clipping, Flat, PerLayer
from dptune.mechanism import ROUNDING
from tests.private_sum import NoNoise, config_for, sum_so_far
from tests.ranks import run_ranks
from tests.whole_models import squared_outputs, whole_model

CLIP_NORM = 0.5
LAYERS = ("0", "2")
STYLES: dict[str, Clipping] = {
    "flat": FLAT,
    "per layer": PerLayer(),
    "per layer, given": PerLayer({"0": 0.3, "2": 0.4}),
    "automatic": Automatic(gamma=0.02),
    "adaptive": Adaptive(count_noise=2.0),
}


class NoLedger:
    """Keeps the recorded clip norms."""

    group_size = 1

    def __init__(self) -> None:
        self.clip_norms: list[float] = []

    def record(self, *, clip_norm: float, **_settings: float) -> None:
        self.clip_norms.append(clip_norm)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inputs(count: int = 8) -> Tensor:
    """Examples with very different gradients, one of them tiny."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-4, 1, count, dtype=torch.float64)[:, None]
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) * scales


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - model(torch.zeros_like(x))).square().sum(1)


def gradients(x: Tensor) -> list[dict[str, Tensor]]:
    """One example at a time, by autograd: {layer: flat gradient}."""
    own, found = model(), []
    for row in x:
        grads = dict(
            zip(
                (name for name, _ in own.named_parameters()),
                torch.autograd.grad(losses(own, row[None]).sum(), list(own.parameters())),
                strict=True,
            )
        )
        found.append(
            {layer: torch.cat([grads[f"{layer}.{key}"].flatten() for key in ("weight", "bias")]) for layer in LAYERS}
        )
    return found


def configured(clipping: Clipping, **changes: float) -> PrivacyConfig:
    return replace(config_for(20, clip_norm=CLIP_NORM), clipping=clipping, **changes)


def released(clipping: Clipping, x: Tensor) -> Tensor:
    """Everything that a step releases, before noise: the clipped sum, then the count."""
    config, own = configured(clipping), model()
    size = sum(parameter.numel() for parameter in own.parameters()) + isinstance(clipping, Adaptive)
    with PrivateStep(own, config, ledger=NoLedger(), noise=NoNoise(size)) as step:
        for rows in x.split(3):
            step.backward(losses(own, rows))
        total: Tensor = sum_so_far(step).clone()
    return total


def expected(clipping: Clipping, grads: dict[str, Tensor]) -> Tensor:
    """One example's contribution to the clipped sum."""
    whole = torch.cat(list(grads.values()))
    norm = whole.norm().item()
    if isinstance(clipping, PerLayer):
        thresholds = clipping.clip_norms or dict.fromkeys(LAYERS, CLIP_NORM / math.sqrt(2))
        parts = [own * min(1, thresholds[layer] / own.norm().item()) for layer, own in grads.items()]
        return torch.cat(parts)
    if isinstance(clipping, Automatic):
        return whole * CLIP_NORM / (norm + clipping.gamma)
    return whole * min(1, CLIP_NORM / norm)


@pytest.mark.parametrize("style", STYLES)
def test_the_sum_is_the_style_applied_to_each_example(style: str) -> None:
    x = inputs()
    wanted = sum(expected(STYLES[style], grads) for grads in gradients(x))
    found = released(STYLES[style], x)
    assert isinstance(wanted, Tensor)
    # The model's order: weight and bias of one layer, then of the next.
    torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_one_example_moves_what_is_released_by_at_most_the_sensitivity(style: str) -> None:
    clipping, x = STYLES[style], inputs()
    whole, sensitivity = released(clipping, x), configured(clipping).sensitivity
    moved = []
    for index in range(len(x)):
        others = torch.cat([x[:index], x[index + 1 :]])
        moved.append((whole - released(clipping, others)).norm().item())
    assert max(moved) <= sensitivity / (1 + ROUNDING) * (1 + 1e-9)
    assert max(moved) > 0.9 * sensitivity  # and the bound is tight


def test_stated_sensitivities() -> None:
    assert configured(FLAT).sensitivity == pytest.approx(CLIP_NORM * (1 + ROUNDING))
    assert configured(PerLayer()).sensitivity == pytest.approx(CLIP_NORM * (1 + ROUNDING))
    assert configured(PerLayer({"0": 0.3, "2": 0.4})).sensitivity == pytest.approx(0.5 * (1 + ROUNDING))
    assert configured(Automatic()).sensitivity == pytest.approx(CLIP_NORM * (1 + ROUNDING))
    config = configured(Adaptive(count_noise=2.0))
    # The clipped sum, and half a count, scaled so that both have the same noise.
    scale = config.count_scale(CLIP_NORM)
    assert config.sensitivity == pytest.approx(math.hypot(CLIP_NORM, scale / 2) * (1 + ROUNDING))
    assert config.noise_std == pytest.approx(config.noise_multiplier * config.sensitivity)


@pytest.mark.parametrize("count_noise", [0.6, 2.0, 50.0])
def test_the_count_is_paid_for(count_noise: float) -> None:
    """Two Gaussian releases cost as much as one with noise (1 / a^2 + 1 / b^2)^(-1/2)."""
    config = configured(Adaptive(count_noise=count_noise))
    gradient, count = config.gradient_noise_multiplier, 2 * count_noise
    assert gradient > config.noise_multiplier
    together = (gradient**-2 + count**-2) ** -0.5
    assert together == pytest.approx(config.noise_multiplier)
    settings = {"sampling_probability": config.sampling_probability, "steps": config.steps, "delta": config.delta}
    assert config.planned_epsilon() == epsilon(noise_multiplier=config.noise_multiplier, **settings)
    assert config.planned_epsilon() > epsilon(noise_multiplier=gradient, **settings)


@pytest.mark.parametrize("style", STYLES)
def test_a_step_records_the_noise_that_is_accounted(style: str, tmp_path: Path) -> None:
    """Not the gradient's own, which is larger where a count is released beside it."""
    own, config, ledger = model(), configured(STYLES[style]), Ledger(tmp_path / "ledger.jsonl")
    with PrivateStep(own, config, ledger=ledger) as step:
        step.backward(losses(own, inputs(3)))
        step.finish()
    assert ledger.spends == [Spend(config.noise_multiplier, config.sampling_probability, 1)]


def test_a_count_with_too_little_noise_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"count_noise=0\.5: must be above 0\.5"):
        configured(Adaptive(count_noise=0.5))
    with pytest.raises(InvalidArgument, match="count_noise"):
        replace(config_for(20, clip_norm=1.0, expected_batch_size=10), clipping=Adaptive())  # a 20th of 10


def test_layers_clip_norms_must_fit_the_model_and_the_whole() -> None:
    with pytest.raises(InvalidArgument, match=r"clip_norm=0\.5: the layers' clip norms combine to 5\.0"):
        configured(PerLayer({"0": 3.0, "2": 4.0}))
    for given, message in (
        ({"0": 0.5}, "clip_norms='2': this trained layer has no"),
        ({"0": 0.3, "2": 0.3, "9": 0.2645751311064591}, "clip_norms='9': there is no"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            PrivateStep(model(), configured(PerLayer(given)), ledger=NoLedger(), noise=NoNoise(43))


def test_matrices_of_one_adapter_are_one_layer() -> None:
    names = ("h.0.q.lora.A.weight", "h.0.q.lora.B.weight", "h.0.ln.weight", "h.0.ln.bias", "weight")
    assert list(layers_of(names).values()) == ["h.0.q.lora", "h.0.q.lora", "h.0.ln", "h.0.ln", ""]


def test_a_layer_that_a_micro_batch_does_not_use_still_has_its_share() -> None:
    """With two trained layers, the threshold is C / sqrt(2) even if one of them was skipped."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.skipped = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    own = Skipping()
    with PrivateStep(own, configured(PerLayer()), ledger=NoLedger(), noise=NoNoise(16)) as step:
        step.backward(100 * own(torch.ones(1, 4)).sum(1))
        assert sum_so_far(step).norm().item() == pytest.approx(CLIP_NORM / math.sqrt(2))


@pytest.mark.parametrize("style", STYLES)
def test_an_example_that_is_not_finite_adds_no_gradient(style: str) -> None:
    x = inputs()
    x[3, 1] = math.inf
    found = released(STYLES[style], x)
    assert found.isfinite().all()
    if isinstance(STYLES[style], Adaptive):  # it counts as clipped
        found = found[:-1]
    others = released(STYLES[style], torch.cat([x[:3], x[4:]]))[: len(found)]
    torch.testing.assert_close(found, others)


def adapted_norms(steps: int, quantile: float, start: float) -> tuple[list[float], list[float]]:
    """(recorded clip norms of the steps, norms of the examples)."""
    own, x = model(), inputs(40)[20:]
    config = replace(
        configured(Adaptive(quantile=quantile, count_noise=2.0), clip_norm=start),
        num_examples=40,
        expected_batch_size=20,
    )
    ledger, norms = NoLedger(), torch.empty(0)
    with PrivateStep(own, config, ledger=ledger, noise=NoNoise(44)) as step:
        for _ in range(steps):
            norms = step.backward(losses(own, x)).norms
            step.finish()
    return ledger.clip_norms, norms.tolist()


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 100.0])
def test_an_adaptive_clip_norm_finds_the_quantile(quantile: float, start: float) -> None:
    clip_norms, norms = adapted_norms(200, quantile, start)
    assert clip_norms[0] == start
    assert np.mean(np.array(norms) <= clip_norms[-1]) == pytest.approx(quantile, abs=0.06)


def test_the_next_clip_norm_goes_up_when_too_many_are_clipped_and_by_a_bounded_factor() -> None:
    adaptive = Adaptive(quantile=0.5, learning_rate=0.2)
    assert adaptive.next_clip_norm(1.0, 0.0) == pytest.approx(math.exp(0.1))
    assert adaptive.next_clip_norm(1.0, 1.0) == pytest.approx(math.exp(-0.1))
    assert adaptive.next_clip_norm(1.0, 0.5) == 1.0
    assert adaptive.next_clip_norm(1.0, -1e9) == pytest.approx(math.e)


def test_a_dummy_is_not_counted() -> None:
    """A rank without examples runs a dummy row whose gradient is zero. It is no example, so it is not counted."""
    x = inputs(4)
    dummy = torch.zeros(1, 4, dtype=torch.float64)
    with_dummy, without = released(STYLES["adaptive"], torch.cat([x, dummy])), released(STYLES["adaptive"], x)
    torch.testing.assert_close(with_dummy, without, rtol=1e-12, atol=1e-15)


def test_all_ranks_go_on_with_the_same_clip_norm() -> None:
    x, models = inputs(12), [model() for _ in range(3)]  # not in the threads, because they share one random generator

    def work(rank: int, gather):
        own = models[rank]
        config = configured(STYLES["adaptive"])
        with PrivateStep(
            own, config, ledger=NoLedger(), noise=NoNoise(44), gather=gather, rank=rank, world_size=3
        ) as step:
            step.backward(losses(own, x[rank * 4 : rank * 4 + 4]))
            step.finish()
            state = step.state_dict()
        again = PrivateStep(own, config, ledger=NoLedger(), noise=NoNoise(44))
        again.load_state_dict(state)
        return step.clip_norm, again.clip_norm

    together = {norm for pair in run_ranks(3, work) for norm in pair}
    own = model()
    with PrivateStep(own, configured(STYLES["adaptive"]), ledger=NoLedger(), noise=NoNoise(44)) as step:
        step.backward(losses(own, x))
        step.finish()
        assert len(together) == 1
        assert together.pop() == pytest.approx(step.clip_norm)
        assert step.clip_norm != CLIP_NORM


@pytest.mark.parametrize("style", ["flat", "automatic", "per layer"])
def test_a_loss_scale_changes_no_style(style: str) -> None:
    own, sums = whole_model("BERT, classes"), []
    ids = torch.randint(5, 400, (4, 6), generator=torch.Generator().manual_seed(0))
    size = sum(parameter.numel() for parameter in own.parameters())
    for scale in (1.0, 1024.0):
        with PrivateStep(
            own, configured(STYLES[style]), ledger=NoLedger(), noise=NoNoise(size), loss_scale=scale
        ) as step:
            step.backward(squared_outputs(own, ids))
            sums.append(sum_so_far(step).clone())
    torch.testing.assert_close(*sums)


def test_styles_are_plain_values() -> None:
    assert Flat() == FLAT
    with pytest.raises(InvalidArgument, match="gamma=0"):
        Automatic(gamma=0)
    with pytest.raises(InvalidArgument, match="quantile=1"):
        Adaptive(quantile=1)


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-200, 1e300, 1.7e308])
def test_a_style_takes_no_value_that_float32_cannot_hold(value: float) -> None:
    """Under a gamma near 0, a gradient of zeros was divided by 0, and the sum became NaN."""
    for name, make in {
        "gamma": lambda: Automatic(gamma=value),
        "count_noise": lambda: Adaptive(count_noise=value),
        "clip_norms[0]": lambda: PerLayer({"0": value}),
    }.items():
        with pytest.raises(InvalidArgument, match=rf"^{re.escape(name)}=.*: give a number from 1e-\d\d to 1e\+\d\d$"):
            make()


@pytest.mark.parametrize("gamma", [1e-12, 1e12])
def test_a_gradient_of_zeros_adds_nothing_under_any_gamma(gamma: float) -> None:
    config = replace(configured(Automatic(gamma=gamma)), clip_norm=1e20)
    factors = Clipper(config.clipping, ["w"]).factors({"w": torch.zeros(1, dtype=torch.float64)}, config.clip_norm)
    assert factors["w"].float().isfinite().all()


def test_an_adaptive_clip_norm_stays_within_its_range() -> None:
    clip_norm = 1.0
    for share, end in ((1.0, 1e-20), (0.0, 1e20)):
        for _ in range(1000):
            clip_norm = Adaptive().next_clip_norm(clip_norm, share)
        assert clip_norm == end


@pytest.mark.parametrize("style", STYLES)
def test_a_step_tells_which_examples_it_scaled_down(style: str) -> None:
    own, x, clipping = model(), inputs(), STYLES[style]
    with PrivateStep(own, configured(clipping), ledger=NoLedger(), noise=NoNoise(len(released(clipping, x)))) as step:
        told = step.backward(losses(own, x)).clipped.tolist()
    smaller = [
        bool((expected(clipping, grads).abs() < torch.cat(list(grads.values())).abs() * (1 - 1e-9)).any())
        for grads in gradients(x)
    ]
    assert told == smaller
    assert set(told) == {False, True}


def test_with_an_adaptive_clip_norm_the_steps_own_one_decides_who_was_clipped() -> None:
    own, x, clipping = model(), inputs(), STYLES["adaptive"]
    for clip_norm, share in ((1e-12, 1.0), (1e6, 0.0)):
        noise = NoNoise(len(released(clipping, x)))
        with PrivateStep(own, configured(clipping), ledger=NoLedger(), noise=noise) as step:
            step.clip_norm = clip_norm
            assert step.backward(losses(own, x)).clipped.double().mean() == share
