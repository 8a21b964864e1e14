"""The optimizer and the learning rate that a run has where its flags leave them open."""

from __future__ import annotations

import pytest

from dptune.mechanism import PrivacyConfig
from tests import tiny
from utils.cli.flags import parse
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups
from utils.training.chosen_defaults import (
    PLAIN_RATE,
    describe_chosen,
    private_rate,
    private_rate_of,
    rate_under_noise,
    with_chosen_defaults,
)

LINE = ("--model_name_or_path", "m", "--train_file", "rows.jsonl", "--output_dir", "out")
PRIVATE, PLAIN = ("--target_epsilon", "8"), ("--clip_norm", "-1", "--noise_multiplier", "-1")


def mechanism(bands: int, *, noise: float = 0.5, steps: int = 60) -> PrivacyConfig:
    """256 of 8,000 rows per step."""
    return PrivacyConfig(
        num_examples=8_000,
        expected_batch_size=256,
        steps=steps,
        clip_norm=1.0,
        noise_multiplier=noise,
        delta=1e-5,
        noise_bands=bands,
    )


def groups(*words: str) -> Groups:
    return Groups(*parse(*CAUSAL_LM_GROUPS, args=[*LINE, *words]))


@pytest.mark.parametrize(
    ("words", "bands", "optimizer", "rate"),
    [
        (PRIVATE, 4, "lowpass-adam", 6e-3),
        ((*PRIVATE, "--trainable", "all"), 2, "lowpass-adam", 2.6e-3),
        (PRIVATE, 1, "adamw", 6e-3),
        ((*PRIVATE, "--trainable", "*.mlp.*"), 8, "lowpass-adam", 4e-3),
        (PLAIN, None, "adamw", PLAIN_RATE),
        ((*PLAIN, "--trainable", "all"), None, "adamw", PLAIN_RATE),
        ((*PRIVATE, "--optimizer", "adamw"), 4, "adamw", 6e-3),
        ((*PRIVATE, "--learning_rate", "0.5"), 4, "lowpass-adam", 0.5),
    ],
)
def test_what_is_left_open_goes_by_privacy_and_what_is_trained(
    words: tuple[str, ...], bands: int | None, optimizer: str, rate: float
) -> None:
    given, config = groups(*words), None if bands is None else mechanism(bands)
    model = tiny.tiny_llama()
    chosen = with_chosen_defaults(given, model, config)
    assert (chosen.optimization.optimizer, chosen.optimization.learning_rate) == (optimizer, rate)
    assert chosen.optimization.updates.optimizer == optimizer
    told = "\n".join(describe_chosen(given, chosen))
    assert (f"optimizer              {optimizer} (default" in told) == ("--optimizer" not in words)
    assert (f"learning rate          {rate:g} (default" in told) == ("--learning_rate" not in words)
    assert with_chosen_defaults(chosen, model, config) == chosen


@pytest.mark.parametrize(
    ("words", "bands"),
    [
        (PRIVATE, "auto"),
        (("--noise_multiplier", "1"), "1"),
        ((*PRIVATE, "--noise_bands", "3"), "3"),
        (PLAIN, None),
    ],
)
def test_noise_is_correlated_where_a_target_is_given(words: tuple[str, ...], bands: str | None) -> None:
    given = groups(*words)
    chosen = with_chosen_defaults(given, tiny.tiny_llama(), mechanism(1) if given.privacy.is_private else None)
    assert chosen.privacy.noise_bands == bands
    assert chosen.privacy.settings() == given.privacy.settings()


@pytest.mark.parametrize(
    ("parameters", "width", "whole", "rate"),
    [
        (10**6, 64, False, 6e-3),
        (10**9, 2048, False, 2e-3),
        (7 * 10**9, 4096, False, 1e-3),
        (260_000, 64, True, 4e-3),
        (124 * 10**6, 768, True, 3.5e-4),
        (7 * 10**9, 4096, True, 6.5e-5),
        (1_000, 8, True, 4e-3),
    ],
)
def test_rates_fall_with_the_size_of_the_model(parameters: int, width: int, whole: bool, rate: float) -> None:
    assert private_rate(parameters, width, mechanism(8), "lowpass-adam", whole=whole) == rate


@pytest.mark.parametrize(
    ("bands", "noise", "optimizer", "rate"),
    [
        (1, 0.5, "adamw", 6e-3),
        (1, 4 * 0.004 * 256, "adamw", 3e-3),  # half of it at four times the noise that is not yet loud
        (8, 0.5, "lowpass-adam", 4e-3),
        (16, 0.5, "lowpass-adam", 4e-3),
        (2, 0.5, "lowpass-adam", 2.5e-3),
        (1, 0.5, "lowpass-adam", 1.8e-3),
        (8, 10.0, "lowpass-adam", 1.9e-3),
    ],
)
def test_rates_of_whole_models_fall_with_noise_and_with_few_bands(
    bands: int, noise: float, optimizer: str, rate: float
) -> None:
    assert rate_under_noise(6e-3, mechanism(bands, noise=noise, steps=75), optimizer) == rate


@pytest.mark.parametrize(("steps", "rate"), [(75, 6e-3), (4 * 75, 4.2e-3), (16 * 75, 3e-3)])
def test_rates_of_whole_models_fall_in_long_runs_with_noise(steps: int, rate: float) -> None:
    loud, quiet = (mechanism(1, noise=noise * 256, steps=steps) for noise in (0.004, 0.0001))
    assert rate_under_noise(6e-3, loud, "adamw") == rate
    assert rate_under_noise(6e-3, quiet, "adamw") == 6e-3


def test_a_run_of_fewer_steps_than_bands_has_its_rate() -> None:
    assert rate_under_noise(6e-3, mechanism(4, steps=4), "lowpass-adam") == 4e-3


def test_a_models_size_and_width_are_its_own() -> None:
    model, noise = tiny.tiny_llama(hidden=128), (mechanism(2), "lowpass-adam")
    assert private_rate_of(model, *noise, whole=True) == private_rate(1, 128, *noise, whole=True)
    assert private_rate_of(model, *noise, whole=False) == private_rate(10**6, 128, *noise, whole=False)
