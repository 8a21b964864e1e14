"""The mechanism's numbers; none can be out of range or changed later."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dptune import InvalidArgument, PoissonSampler, PrivacyConfig, accounting
from dptune.clipping_styles import FLAT, Adaptive, Clipping
from dptune.mechanism import ROUNDING, sampling_probability
from dptune.sampling import Parts

SETTING: dict[str, Any] = {
    "num_examples": 1000,
    "expected_batch_size": 50.0,
    "steps": 20,
    "clip_norm": 0.3,
    "noise_multiplier": 1.5,
    "delta": 1e-5,
}


def test_noise_sensitivity_probability_and_divisor() -> None:
    config = PrivacyConfig(**SETTING)
    assert config.sensitivity == pytest.approx(0.3 * (1 + ROUNDING))
    assert config.noise_std == pytest.approx(1.5 * 0.3 * (1 + ROUNDING))
    assert config.sampling_probability == pytest.approx(0.05)
    assert config.divisor == 50.0


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 7.0])
def test_the_noise_over_the_sensitivity_is_the_noise_multiplier_at_any_clip_norm(clip_norm: float) -> None:
    config = PrivacyConfig(**SETTING | {"clip_norm": clip_norm})
    assert config.noise_std / config.sensitivity == pytest.approx(1.5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_add_up_to_the_whole(world_size: int) -> None:
    config = PrivacyConfig(**SETTING)
    assert world_size * config.noise_std_per_rank(world_size) ** 2 == pytest.approx(config.noise_std**2)


def test_it_is_frozen_and_takes_names_only() -> None:
    config = PrivacyConfig(**SETTING)
    for name, value in SETTING.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, value)
    with pytest.raises(TypeError):
        PrivacyConfig(*SETTING.values())  # type: ignore[call-arg]


def test_the_planned_epsilon_is_the_accountants() -> None:
    expected = accounting.epsilon(noise_multiplier=1.5, sampling_probability=0.05, steps=20, delta=1e-5)
    assert PrivacyConfig(**SETTING).planned_epsilon() == expected > 0


def test_the_least_noise_for_an_epsilon() -> None:
    others = {name: value for name, value in SETTING.items() if name != "noise_multiplier"}
    config = PrivacyConfig.for_epsilon(target_epsilon=3.0, **others)
    assert 0.99 * 3 < config.planned_epsilon() <= 3
    assert {name: getattr(config, name) for name in others} == others


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("num_examples", 0, "give a whole number of at least 1"),
        ("num_examples", 10.5, "give a whole number"),
        ("num_examples", math.inf, "give a whole number"),
        ("steps", 0, "give a whole number of at least 1"),
        ("steps", True, "give a whole number"),
        ("clip_norm", 0.0, "give a finite number above 0"),
        ("clip_norm", -1.0, "give a finite number above 0"),
        ("clip_norm", math.inf, "give a finite number above 0"),
        ("clip_norm", 1e-21, "give a number from 1e-20 to 1e+20"),
        ("clip_norm", 1e21, "give a number from 1e-20 to 1e+20"),
        ("noise_multiplier", 1e-310, "the noise would be too small for floating point"),
        ("noise_multiplier", 1.7e308, "the noise would be too large for floating point"),
        ("expected_batch_size", 5e-324, "so small that nothing would ever be drawn"),
        ("steps", 10**400, "give a whole number of at least 1, below 2^63"),
        ("noise_multiplier", 0.0, "give a finite number above 0"),
        ("noise_multiplier", math.nan, "give a finite number above 0"),
        ("expected_batch_size", 0.0, "give a finite number above 0"),
        ("expected_batch_size", 1000.5, "must be at most the 1000 examples there are"),
        ("delta", 0.0, "give a number above 0 and below 1"),
        ("delta", 1.0, "give a number above 0 and below 1"),
        ("delta", math.nan, "give a number above 0 and below 1"),
        ("delta", 1e-3, "must be below 1/num_examples = 0.001"),
        ("delta", 2e-3, "must be below 1/num_examples = 0.001"),
    ],
)
def test_a_value_out_of_range_is_refused_with_name_value_and_remedy(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PrivacyConfig(**SETTING | {name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: {remedy}")
    assert "\n" not in str(caught.value)


TINY, HUGE = (5e-324, 1e-300, 1e-200, 1e-160, 1e-17), (1e17, 1e160, 1e300, 1.7e308)
STYLES: dict[str, Clipping] = {
    "flat": FLAT,
    "adaptive": Adaptive(count_noise=2.0),
    "adaptive, little count noise": Adaptive(count_noise=1e-20),
    "adaptive, large count noise": Adaptive(count_noise=1e20),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier", "delta", "expected_batch_size"])
@pytest.mark.parametrize("value", [*TINY, *HUGE])
def test_an_extreme_value_is_refused_or_has_noise_and_an_epsilon(name: str, value: float, style: str) -> None:
    """With adaptive clipping, a noise multiplier of 1e-200 ended in an OverflowError."""
    try:
        config = PrivacyConfig(**SETTING | {name: value, "clipping": STYLES[style]})
    except InvalidArgument:
        return
    numbers = [config.noise_std, config.noise_std_per_rank(1024), config.grid(), config.sensitivity]
    numbers += [config.sampling_probability, config.gradient_noise_multiplier]
    if isinstance(config.clipping, Adaptive):
        numbers += [config.count_scale(config.clip_norm), config.clipping.next_clip_norm(config.clip_norm, 1e300)]
    assert all(0 < number < math.inf for number in numbers)
    assert config.planned_epsilon() >= 0


def test_an_infinite_epsilon_is_said_before_training() -> None:
    for clipping in (FLAT, Adaptive(count_noise=2.0)):
        config = PrivacyConfig(**SETTING | {"noise_multiplier": 1e-200, "clipping": clipping})
        assert config.planned_epsilon() == math.inf


def test_the_ends_of_the_ranges_are_allowed() -> None:
    assert PrivacyConfig(**SETTING | {"expected_batch_size": 1000.0}).sampling_probability == 1
    assert PrivacyConfig(**SETTING | {"delta": 0.999e-3}).delta == 0.999e-3
    assert sampling_probability(0.5, 1000) == 0.0005  # less than one example per step is valid too


# --- weights ---

PARTS = Parts((600, 400), (1.0, 3.0))
WEIGHTED = SETTING | {"parts": PARTS}


def test_epsilon_is_that_of_the_largest_probability() -> None:
    """0.05 on average, 50 / (600 / 3 + 400) for the rows of the larger weight; no other row has a larger epsilon."""
    config = PrivacyConfig(**WEIGHTED)
    assert config.sampling_probability == pytest.approx(50 / 600)
    of_each = [config.sampling_probability * share for share in PARTS.shares]
    assert sum(size * q for size, q in zip(PARTS.sizes, of_each, strict=True)) == pytest.approx(50)
    assert of_each[1] == pytest.approx(3 * of_each[0])
    cost = {"noise_multiplier": 1.5, "steps": 20, "delta": 1e-5}
    epsilons = [accounting.epsilon(sampling_probability=q, **cost) for q in of_each]
    average = accounting.epsilon(sampling_probability=0.05, **cost)
    assert epsilons[0] < average < epsilons[1] == config.planned_epsilon()
    assert config.divisor == 50.0


def test_the_noise_for_an_epsilon_covers_the_largest_probability() -> None:
    others = {name: value for name, value in WEIGHTED.items() if name != "noise_multiplier"}
    config = PrivacyConfig.for_epsilon(target_epsilon=2.0, **others)
    assert config.planned_epsilon() <= 2.0
    plain = PrivacyConfig.for_epsilon(target_epsilon=2.0, **others | {"parts": None})
    assert config.noise_multiplier > plain.noise_multiplier


def test_probabilities_depend_on_the_parts_alone_and_not_on_rows() -> None:
    """Sizes are public, as the number of examples is. The mechanism of two neighbours is the same."""
    assert PrivacyConfig(**WEIGHTED).sampling_probability == sampling_probability(50.0, 1000, PARTS)
    assert sampling_probability(50.0, 1000, Parts((600, 400), (2.0, 6.0))) == sampling_probability(50.0, 1000, PARTS)


def test_a_probability_above_one_is_refused_with_the_batch_that_fits() -> None:
    assert PrivacyConfig(**WEIGHTED | {"expected_batch_size": 600.0}).sampling_probability == 1
    with pytest.raises(InvalidArgument, match=r"^expected_batch_size=601: with these weights it must be at most 600: "):
        PrivacyConfig(**WEIGHTED | {"expected_batch_size": 601})


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="add up to 1000, but there are 999 examples"):
        PrivacyConfig(**WEIGHTED | {"num_examples": 999})
    with pytest.raises(InvalidArgument, match="group_size=2: examples of one unit may have several weights"):
        PrivacyConfig(**WEIGHTED | {"group_size": 2})


@pytest.mark.parametrize("parts", [None, Parts((400, 600), (3.0, 1.0))])
def test_a_sampler_with_other_weights_is_refused(parts: Parts | None) -> None:
    config = PrivacyConfig(**WEIGHTED)
    config.require_sampler(PoissonSampler(1000, config.sampling_probability, parts=PARTS))
    with pytest.raises(InvalidArgument, match="has other weights than the configuration"):
        config.require_sampler(PoissonSampler(1000, config.sampling_probability, parts=parts))


# --- cut draws ---

CUT = SETTING | {"max_batch": 62}


def test_epsilon_is_that_of_cut_draws_and_the_divisor_stays() -> None:
    config, plain = PrivacyConfig(**CUT), PrivacyConfig(**SETTING)
    assert config.cut == accounting.Cut(62, 1000)
    assert plain.cut is None
    cost = {"noise_multiplier": 1.5, "sampling_probability": 0.05, "steps": 20, "delta": 1e-5}
    assert config.planned_epsilon() == accounting.epsilon(**cost, cut=config.cut) > 1.1 * plain.planned_epsilon()
    assert (config.divisor, config.noise_std, config.sampling_probability) == (50.0, plain.noise_std, 0.05)


def test_the_noise_for_an_epsilon_covers_the_cut() -> None:
    others = {name: value for name, value in CUT.items() if name != "noise_multiplier"}
    config = PrivacyConfig.for_epsilon(target_epsilon=2.0, **others)
    assert config.max_batch == 62
    assert 1.99 < config.planned_epsilon() <= 2.0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"max_batch": 49}, "max_batch=49: most draws would be cut; give at least the expected batch size, 50"),
        ({"max_batch": 0}, "max_batch=0: "),
        ({"group_size": 2}, "max_batch=62: draws of units with up to 2 examples cannot be cut"),
        ({"parts": PARTS}, "max_batch=62: draws with weights cannot be cut"),
    ],
)
def test_cuts_whose_cost_is_not_known_are_refused(changed: dict[str, Any], told: str) -> None:
    others = {name: value for name, value in CUT.items() if name != "noise_multiplier"} | changed
    with pytest.raises(InvalidArgument, match=f"^{told}"):
        PrivacyConfig(**CUT | changed)
    with pytest.raises(InvalidArgument, match=f"^{told}"):
        PrivacyConfig.for_epsilon(target_epsilon=2.0, **others)


@pytest.mark.parametrize(("settings", "most"), [(CUT, None), (CUT, 63), (SETTING, 62)])
def test_a_sampler_that_cuts_elsewhere_is_refused(settings: dict[str, Any], most: int | None) -> None:
    config = PrivacyConfig(**settings)
    config.require_sampler(PoissonSampler(1000, 0.05, max_batch=config.max_batch))
    with pytest.raises(InvalidArgument, match=f"cuts draws at {most}, but epsilon is that of draws cut at"):
        config.require_sampler(PoissonSampler(1000, 0.05, max_batch=most))
