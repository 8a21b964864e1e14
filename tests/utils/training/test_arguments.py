"""All flags of training: renamed parameters exist, and those of privacy are read or refused without it."""

from __future__ import annotations

import dataclasses

import pytest

from dptune._validate import InvalidArgument
from utils.classification import arguments as classification
from utils.cli.flags import parse
from utils.training.arguments import CAUSAL_LM_GROUPS, ONLY_PRIVATE, TRAINING_FLAGS, Groups
from utils.training.clipping_arguments import ClippingArguments
from utils.training.privacy_flags import PrivacyFlags

PRIVACY = (PrivacyFlags, ClippingArguments)


SAYS_WHAT_IS_DRAWN = {
    "privacy_unit",
    "examples_per_unit",
    "user_level_method",
    "unit_gradient",
    "ignore_users",
    "insecure_test_seed",
    "max_batch",
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


def test_an_open_clip_norm_and_given_ones_contradict_each_other() -> None:
    line = ["--train_file", "x", "--model_name_or_path", "x", "--output_dir", "x", "--noise_multiplier", "1"]
    line += ["--clip_norm", "auto", "--clipping", "per-layer"]
    Groups(*parse(*CAUSAL_LM_GROUPS, args=line)).refuse_unread(set())
    groups = Groups(*parse(*CAUSAL_LM_GROUPS, args=[*line, "--layer_clip_norms", "*=0.5"]))
    with pytest.raises(InvalidArgument, match=r"^--clip_norm='auto': --layer_clip_norms gives"):
        groups.refuse_unread(set())


@pytest.mark.parametrize(
    ("groups", "renamed"),
    [(CAUSAL_LM_GROUPS, TRAINING_FLAGS), (classification.CLASSIFIER_GROUPS, classification.CLASSIFIER_FLAGS)],
)
def test_every_renamed_parameter_has_a_flag(groups: tuple[type, ...], renamed: dict[str, str]) -> None:
    assert set(renamed.values()) <= {f"--{one.name}" for group in groups for one in dataclasses.fields(group)}


@pytest.mark.parametrize("name", ["lora_r", "lora_alpha", "use_rslora", "lora_target_modules", "lora_dropout"])
def test_a_flag_of_adapters_is_refused_where_the_models_own_weights_are_trained(name: str) -> None:
    line = ["--train_file", "x", "--model_name_or_path", "x", "--output_dir", "x", *ON]
    adapters, own = (Groups(*parse(*CAUSAL_LM_GROUPS, args=[*line, *how])) for how in ([], ["--trainable", "all"]))
    adapters.refuse_unread({name})
    own.refuse_unread({"trainable"})
    with pytest.raises(
        InvalidArgument, match=rf"^--{name}=.*: is for adapters, but --trainable trains the model's own"
    ):
        own.refuse_unread({name})
