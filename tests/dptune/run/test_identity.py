"""A run resumes only from its own checkpoint; the error names every difference."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dptune import InvalidArgument, add_lora
from dptune.clipping_styles import Adaptive
from dptune.run.identity import mechanism_identity, model_identity, num_trained, refuse_other_run
from dptune.run.plan import make_plan
from dptune.run.settings import PrivacySettings
from dptune.sampling import Parts
from dptune.units.unit import ItemUnit
from tests.examples import randomise_adapters
from tests.processes import run_processes
from tests.tiny import tiny_llama
from utils.cli.launch import Sharding
from utils.models.loading import load_model

IDENTITY: dict[str, Any] = {
    "run": {"clip_norm": 1.0, "noise_multiplier": 0.9, "target_epsilon": None, "training_data": "ab12"},
    "adapters": {"model.layers.0.q_proj": [2, 32, 32, 4.0]},
    "targets": ["q_proj", "v_proj"],
}


@pytest.mark.parametrize(
    ("saved", "current"),
    [
        (IDENTITY, json.loads(json.dumps(IDENTITY))),
        (IDENTITY, IDENTITY | {"targets": ("q_proj", "v_proj")}),  # both have the same JSON
        ({}, {}),
    ],
)
def test_the_same_run_may_go_on(saved: dict[str, Any], current: dict[str, Any]) -> None:
    try:
        refuse_other_run(saved, current)
        refusal = None
    except InvalidArgument as error:
        refusal = str(error)
    assert refusal is None


@pytest.mark.parametrize(
    ("current", "told"),
    [
        (
            IDENTITY | {"run": IDENTITY["run"] | {"clip_norm": 0.5}},
            ["run.clip_norm was 1.0 in the checkpoint and is 0.5 now"],
        ),
        (
            IDENTITY | {"run": {"clip_norm": 2, "noise_multiplier": 0.9, "target_epsilon": 8.0}},
            ["run.clip_norm was 1.0 ", "run.target_epsilon was None in the checkpoint and is 8.0 now",
             "run.training_data was 'ab12' in the checkpoint and is absent now"],
        ),
        (IDENTITY | {"seed": 1}, ["seed was absent in the checkpoint and is 1 now"]),
        (IDENTITY | {"targets": ["q_proj"]}, ["targets[1] was 'v_proj' in the checkpoint and is absent now"]),
        (IDENTITY | {"targets": []}, ["targets was absent in the checkpoint and is [] now"]),
        (
            IDENTITY | {"adapters": {"model.layers.0.q_proj": [3, 32, 32, 4.0]}},
            ["adapters.model.layers.0.q_proj[0] was 2 in the checkpoint and is 3 now"],
        ),
    ],
)  # fmt: skip
def test_every_difference_is_told_with_both_values(current: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        refuse_other_run(IDENTITY, current)
    message = str(caught.value)
    assert message.startswith("resume_from: ")
    assert "\n" not in message
    for part in told:
        assert part in message
    if told[-1] != "targets was absent in the checkpoint and is [] now":
        assert message.count(" was ") == len(told)


def test_many_differences_and_long_values_stay_one_readable_line() -> None:
    saved_identity, current = ({f"key{i}": letter * 1000 for i in range(12)} for letter in "ab")
    with pytest.raises(InvalidArgument, match="and 7 more differ; resume with the settings") as caught:
        refuse_other_run(saved_identity, current)
    assert str(caught.value).count(" was ") == 5
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(("target", "told"), [(3.0, True), (None, False)])
def test_other_noise_for_the_same_epsilon_is_explained(target: float | None, told: bool) -> None:
    saved = {"noise_multiplier": 0.8, "target_epsilon": target}
    with pytest.raises(InvalidArgument) as caught:
        refuse_other_run(saved, saved | {"noise_multiplier": 0.9})
    assert ("with a target epsilon, other steps or another batch need other noise" in str(caught.value)) == told


# --- the mechanism's identity ---

SETTINGS = PrivacySettings(clip_norm=1.0, noise_multiplier=0.9, delta=1e-4)


PARTS = Parts((60, 40), (1.0, 3.0))


def mechanism(*, privacy: bool = True, **changed: Any) -> dict[str, Any]:
    """The identity of a run whose settings or plan differ in some values."""
    how: dict[str, Any] = {"num_examples": 100, "batch": 10, "steps": 8}
    how |= {
        name: changed.pop(name)
        for name in ("num_examples", "batch", "unit", "test_seed", "parts", "max_batch")
        if name in changed
    }
    return mechanism_identity(make_plan(dataclasses.replace(SETTINGS, **changed) if privacy else None, **how))


def test_the_same_mechanism_has_the_same_identity_after_json() -> None:
    assert json.loads(json.dumps(mechanism())) == mechanism()


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("clip_norm", {"clip_norm": 1.5}),
        ("noise_multiplier", {"noise_multiplier": 0.91}),
        ("target_epsilon", {"noise_multiplier": None, "target_epsilon": 3.0}),
        ("delta", {"delta": 2e-4}),
        ("clipping", {"clipping": Adaptive()}),
        ("sampling_probability", {"batch": 11}),
        ("expected_batch_size", {"batch": 11}),
        ("insecure_test_seed", {"test_seed": 1}),
        ("num_examples", {"num_examples": 101}),
        ("privacy_unit", {"unit": ItemUnit("one household")}),
        ("group_size", {"unit": ItemUnit(group_size=2)}),
        (r"parts\[0\]\[0\]", {"parts": PARTS}),
        ("max_batch", {"max_batch": 20}),
        ("clip_norm", {"privacy": False}),
    ],
)
def test_a_change_of_the_mechanism_is_refused_by_name(named: str, changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=rf"(: |, ){named} was .* in the checkpoint and is .* now"):
        refuse_other_run(mechanism(), mechanism(**changed))


def test_weights_are_compared_by_their_ratios() -> None:
    refuse_other_run(mechanism(parts=PARTS), mechanism(parts=Parts((60, 40), (2.0, 6.0))))
    for other in (Parts((60, 40), (1.0, 4.0)), Parts((40, 60), (1.0, 3.0)), None):
        with pytest.raises(InvalidArgument, match="parts"):
            refuse_other_run(mechanism(parts=PARTS), mechanism(parts=other))


# --- the model's identity ---


def adapted(model: Any = None, **how: Any) -> Any:
    model = model or tiny_llama()
    settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")}
    add_lora(model, **settings | how)
    return model


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"rank": 5}, r"adapters\.model\.layers\.0\.self_attn\.q_proj\[0\] was 4 in the checkpoint and is 5 now"),
        ({"alpha": 9.0}, r"was 8\.0 in the checkpoint and is 9\.0 now"),
        ({"targets": ("q_proj",)}, r"v_proj\[0\] was 4 in the checkpoint and is absent now"),
        ({"targets": ("q_proj", "v_proj", "o_proj")}, r"o_proj\[0\] was absent in the checkpoint and is 4 now"),
    ],
)
def test_another_adapter_is_refused_by_name(how: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        refuse_other_run(model_identity(adapted()), model_identity(adapted(**how)))


@pytest.mark.parametrize("seed", [1, 2])
def test_another_base_is_refused(seed: int) -> None:
    with pytest.raises(InvalidArgument, match="base_model was"):
        refuse_other_run(model_identity(adapted()), model_identity(adapted(tiny_llama(seed))))


def test_one_changed_base_weight_is_another_base_and_training_changes_nothing() -> None:
    before = model_identity(adapted())
    model = adapted()
    randomise_adapters(model)
    assert model_identity(model) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] *= 1.5
    assert model_identity(model) != before


def rounded_to_bfloat16(folder: Path, out: Path) -> Path:
    """The model's folder with weights that bfloat16 holds exactly, saved in float32."""
    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(folder).bfloat16().float()
    model.save_pretrained(out)
    return out


def loaded_identity(folder: Path, dtype: torch.dtype, sharding: Sharding | None = None) -> dict[str, Any]:
    return model_identity(adapted(load_model(str(folder), dtype=dtype, device=torch.device("cpu"), sharding=sharding)))


def _sharded_identity(_rank: int, _gather: Any, folder: Path) -> dict[str, Any]:
    return loaded_identity(folder, torch.float32, Sharding())


def test_precision_changes_no_identity(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = rounded_to_bfloat16(tiny_model_dir, tmp_path / "rounded")
    assert loaded_identity(folder, torch.bfloat16) == loaded_identity(folder, torch.float32)


def test_sharding_over_ranks_changes_no_identity(tiny_model_dir: Path) -> None:
    """On the main process, which compares. A third of a norm's 32 values is fewer than are sampled of a matrix."""
    found = run_processes(3, _sharded_identity, tiny_model_dir)
    assert found[0] == loaded_identity(tiny_model_dir, torch.float32)


def test_a_model_counts_its_trained_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert num_trained(model) == 4 * 2 + 2
