"""Adapters that the PEFT library made: those of known kinds load exactly, all others are refused by name."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dptune import InvalidArgument, attach_adapter
from dptune.adapter_files import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME
from dptune.lora import adapters
from dptune.peft_format import KNOWN_SETTINGS, read_settings
from tests.dptune.test_lora import logits, tiny_gpt2
from tests.tiny import tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def saved_by_peft(folder: Path, base: Any = None, *, convert: bool = False, **settings: Any) -> Any:
    """Save an adapter whose every trained tensor is random; returns PEFT's model."""
    how: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base or tiny_llama(), LoraConfig(**how | settings)).eval()
        if convert:
            model.save_pretrained(str(folder / "initial"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        how = {"path_initial_model_for_weight_conversion": str(folder / "initial")} if convert else {}
        model.save_pretrained(str(folder), **how)
    return model


def loaded_by_peft(folder: Path, base: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base or tiny_llama(), str(folder)).eval()


EXACT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "ranks and scales by layer": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 11, "model.layers.0.mlp.down_proj": 1.5},
    },
    "rsLoRA with ranks by layer": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a pattern of targets": {"target_modules": r".*\.(q_proj|up_proj)"},
    "all linear but some": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.3},
    "Gaussian start": {"init_lora_weights": "gaussian"},
    "random start": {"init_lora_weights": False},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "EVA's start": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.5)},
    "MiCA's start": {"init_lora_weights": "mica"},
    "the head, whose base weight the file copies": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_known_kind_loads_exactly(kind: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path, **EXACT[kind])
    fresh = tiny_llama()
    attach_adapter(fresh, tmp_path)
    assert not torch.allclose(logits(fresh), logits(tiny_llama()), atol=1e-2)
    torch.testing.assert_close(logits(fresh), logits(loaded_by_peft(tmp_path)), rtol=1e-5, atol=1e-5)


def test_gpt2_with_weights_stored_the_other_way_round_loads_exactly(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    fresh = tiny_gpt2()
    attach_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(loaded_by_peft(tmp_path, tiny_gpt2())), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_loads_once_it_is_converted(start: str, tmp_path: Path) -> None:
    trained = saved_by_peft(tmp_path, convert=True, init_lora_weights=start)
    fresh = tiny_llama()
    attach_adapter(fresh, tmp_path)
    assert {adapter.rank for _, adapter in adapters(fresh)} == {8}
    torch.testing.assert_close(logits(fresh), logits(trained), rtol=1e-4, atol=1e-4)


MORE: dict[str, tuple[dict[str, Any], str]] = {
    "biases of adapted layers": ({"bias": "lora_only"}, "PEFT's bias='lora_only'"),
    "all biases": ({"bias": "all"}, "PEFT's bias='all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"PEFT's modules_to_save=\['lm_head'\]"),
    "tokens": ({"trainable_token_indices": [5, 9]}, r"PEFT's trainable_token_indices=\[5, 9\]"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "PEFT's init_lora_weights='pissa_niter_4'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'.*path_initial_model_for_weight_conversion"),
    "DoRA": ({"use_dora": True}, "PEFT's use_dora=True"),
    "activated LoRA": ({"alora_invocation_tokens": [7, 8]}, r"alora_invocation_tokens=\[7, 8\].*with the PEFT library"),
    "parameters": ({"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]}, "target_parameters="),
    "biases of B": ({"lora_bias": True}, "PEFT's lora_bias=True"),
    "repeated layers": ({"layer_replication": [(0, 2), (1, 2)]}, "PEFT's layer_replication="),
    "an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*belongs to no plain LoRA adapter"),
}


@pytest.mark.parametrize("kind", MORE)
def test_a_kind_that_is_more_than_a_and_b_is_refused_by_name_and_the_model_stays(kind: str, tmp_path: Path) -> None:
    settings, told = MORE[kind]
    if "bias" in settings:  # a Llama has none
        saved_by_peft(tmp_path, tiny_gpt2(), **{"target_modules": ["c_attn"], "fan_in_fan_out": True} | settings)
    else:
        saved_by_peft(tmp_path, **settings)
    for path in (tmp_path, tmp_path / PEFT_WEIGHTS_NAME):
        model = tiny_gpt2() if "bias" in settings else tiny_llama()
        with pytest.raises(InvalidArgument, match=f"^path=.*{told}") as caught:
            attach_adapter(model, path)
        assert "\n" not in str(caught.value)
        assert not any(True for _ in adapters(model))


def test_an_enlarged_vocabulary_is_refused_because_its_rows_would_go_unused(tmp_path: Path) -> None:
    base = tiny_llama()
    base.resize_token_embeddings(base.config.vocab_size + 3)
    saved_by_peft(tmp_path, base).save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / PEFT_WEIGHTS_NAME))
    with pytest.raises(InvalidArgument, match=r"(embed_tokens|lm_head)\.weight differs from the model's own weight"):
        attach_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_bases_own_weight_must_be_that_of_the_model(
    dtype: torch.dtype, tie: bool, tmp_path: Path
) -> None:
    saved_by_peft(tmp_path, tiny_llama(tie=tie), target_modules=["q_proj", "lm_head"])
    path = tmp_path / PEFT_WEIGHTS_NAME
    copied = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in copied
    attach_adapter(tiny_llama(tie=tie).to(dtype), tmp_path)
    copied[key][7, 3] += 0.1
    save_file(copied, path)
    model = tiny_llama(tie=tie).to(dtype)
    with pytest.raises(InvalidArgument, match=rf"{key} differs from the model's own weight"):
        attach_adapter(model, tmp_path)
    assert not any(True for _ in adapters(model))


def test_a_rank_that_the_configuration_does_not_tell_is_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    path = tmp_path / PEFT_CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 3}}))
    with pytest.raises(InvalidArgument, match=rf"the rank of {Q} is 4 in its weights and 3 in its adapter_config"):
        attach_adapter(tiny_llama(), tmp_path)


# --- the list of settings ---


def test_every_setting_of_the_installed_peft_is_in_the_list() -> None:
    assert {one.name for one in dataclasses.fields(LoraConfig)} <= KNOWN_SETTINGS


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("value", [True, 1, "yes", [1], {"a": 1}])
def test_a_setting_that_a_later_version_brings_is_refused_unless_it_is_off(value: object) -> None:
    told = (
        r"^path='folder': PEFT's use_novelty=.* makes it more than .*; this version of dptune does not know it; merge"
    )
    with pytest.raises(InvalidArgument, match=told):
        read_settings(PLAIN | {"use_novelty": value}, "folder")


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_setting_that_is_off_changes_nothing(value: object) -> None:
    off = dict.fromkeys(["use_novelty", "use_dora", "modules_to_save", "loftq_config"], value)
    assert read_settings(PLAIN | off, "folder").alpha_of(Q) == 8


def test_a_long_value_is_cut() -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_settings(PLAIN | {"modules_to_save": ["module"] * 99}, "folder")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("pattern", [{"(": 2}, [3], "q_proj", {"q": 2, "[": 1}])
def test_a_damaged_pattern_is_refused(pattern: object) -> None:
    with pytest.raises(InvalidArgument, match=r"rank_pattern in its adapter_config\.json is damaged"):
        read_settings(PLAIN | {"rank_pattern": pattern}, "folder")


def test_the_first_pattern_that_matches_the_end_of_a_name_counts() -> None:
    settings = read_settings(PLAIN | {"alpha_pattern": {"q_proj": 1, ".*attn.*": 2, "proj": 3}}, "folder")
    found = [settings.alpha_of(name) for name in (Q, "attn.k", "a.proj", "a.o_proj", "a.xq_proj")]
    assert found == [1, 2, 3, 8, 8]
    assert read_settings(PLAIN | {"use_rslora": True, "r": 9}, "folder").alpha_of(Q) == 24
