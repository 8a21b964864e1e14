"""Flags of training: renamed parameters exist, and a clipping style names the flag that it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dptune._validate import InvalidArgument
from dptune.clipping_styles import FLAT, Adaptive, Automatic
from utils.classification import arguments as classification
from utils.cli.flags import parse
from utils.training.arguments import (
    CAUSAL_LM_GROUPS,
    ONLY_PRIVATE,
    TRAINING_FLAGS,
    ClippingArguments,
    Groups,
    PrivacyFlags,
)

PRIVACY = (PrivacyFlags, ClippingArguments)


@pytest.mark.parametrize(
    ("given", "style"),
    [
        ({}, FLAT),
        ({"clipping": "automatic", "automatic_gamma": 0.1}, Automatic(0.1)),
        ({"clipping": "adaptive", "adaptive_quantile": 0.3}, Adaptive(0.3)),
    ],
)
def test_flags_make_a_clipping_style(given: dict[str, Any], style: object) -> None:
    assert ClippingArguments(**given).style([]) == style


@pytest.mark.parametrize(
    ("clipping", "flag"),
    [
        ("automatic", "automatic_gamma"),
        ("adaptive", "adaptive_quantile"),
        ("adaptive", "adaptive_learning_rate"),  # --learning_rate is the optimizer's
        ("adaptive", "adaptive_count_noise"),
    ],
)
def test_a_style_names_its_own_flag(clipping: str, flag: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^--{flag}=-1.0: "):
        ClippingArguments(clipping=clipping, **{flag: -1.0}).style([])


SAYS_WHAT_IS_DRAWN = {
    "privacy_unit",
    "examples_per_unit",
    "user_level_method",
    "unit_gradient",
    "ignore_users",
    "insecure_test_seed",
}
OFF = ["--clip_norm", "-1", "--noise_multiplier", "-1"]
ON = ["--clip_norm", "1", "--noise_multiplier", "1"]


@pytest.mark.parametrize("name", [one.name for group in PRIVACY for one in dataclasses.fields(group)])
def test_each_flag_of_privacy_is_read_without_privacy_or_refused(name: str) -> None:
    line = ["--train_file", "x", "--model_name_or_path", "x", "--output_dir", "x"]
    off, on = (Groups(*parse(*CAUSAL_LM_GROUPS, args=[*line, *how])) for how in (OFF, ON))
    if name in {"clip_norm", "noise_multiplier"} | SAYS_WHAT_IS_DRAWN:
        assert name not in ONLY_PRIVATE
        off.refuse_unread({name})
    else:
        with pytest.raises(InvalidArgument, match=f"^--{name}=.*: is not read without privacy"):
            off.refuse_unread({name, "learning_rate"})
    on.refuse_unread({name})


@pytest.mark.parametrize(
    ("groups", "renamed"),
    [(CAUSAL_LM_GROUPS, TRAINING_FLAGS), (classification.CLASSIFIER_GROUPS, classification.CLASSIFIER_FLAGS)],
)
def test_every_renamed_parameter_has_a_flag(groups: tuple[type, ...], renamed: dict[str, str]) -> None:
    assert set(renamed.values()) <= {f"--{one.name}" for group in groups for one in dataclasses.fields(group)}


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({}, "--privacy_unit"),
        ({"ignore_users": True}, None),
        ({"privacy_unit": "user", "examples_per_unit": 2}, None),
        ({"clip_norm": -1, "noise_multiplier": -1}, None),  # nothing is protected
    ],
)
def test_rows_are_protected_unnoticed_only_by_a_private_run_without_either_flag(
    given: dict[str, Any], flag: str | None
) -> None:
    assert PrivacyFlags(**{"noise_multiplier": 1.0} | given).users_flag == flag


def test_a_unit_of_users_and_ignoring_them_contradict_each_other() -> None:
    with pytest.raises(InvalidArgument, match="--ignore_users=True: contradicts --privacy_unit"):
        PrivacyFlags(noise_multiplier=1.0, privacy_unit="user", examples_per_unit=2, ignore_users=True)
