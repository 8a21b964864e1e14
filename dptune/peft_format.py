"""What PEFT's `adapter_config.json` says about a LoRA adapter: what is known is followed, all else is refused.

Most of PEFT's settings change how an adapter was trained, or which layers it adapts, which the file of weights says
too. Some change what the model computes beyond A and B: biases, other weights, a base that was changed first. Ignoring
one of those would give another model without an error. So each setting must be in the list of this module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from dptune._validate import refuse

_MERGE = "merge it into its base with PEFT's merge_and_unload, and give that model without an adapter"
_WITH_PEFT = "sample from it with the PEFT library"
_CONVERT = "save it again with PEFT's path_initial_model_for_weight_conversion, or merge it into its base with PEFT"
_LONGEST_VALUE = 60
_DEFAULT_RANK = 8  # PEFT's

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # they leave the base as it is
# Settings whose values do not change what the model computes from A and B.
_ANY_VALUE = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # how the base stores its weight; A and B are stored the same way
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_type",  # checked by `read_settings`
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",  # compresses what the backward pass keeps
}
_FOLLOWED = {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"}
# Settings that must be off, and what to do about one that is not.
_OFF = {
    "alora_invocation_tokens": _WITH_PEFT,  # the adapter acts behind certain tokens only
    "arrow_config": _WITH_PEFT,
    "corda_config": _CONVERT,
    "ensure_weight_tying": _MERGE,
    "kasa_config": _MERGE,
    "layer_replication": _MERGE,
    "loftq_config": _MERGE,
    "lora_bias": _MERGE,
    "lora_ga_config": _CONVERT,
    "megatron_config": _WITH_PEFT,
    "modules_to_save": _MERGE,
    "monteclora_config": _MERGE,
    "target_parameters": _MERGE,
    "trainable_token_indices": _MERGE,
    "use_bdlora": _MERGE,
    "use_dora": _MERGE,
    "use_qalora": _MERGE,
}
KNOWN_SETTINGS = frozenset(_ANY_VALUE | _FOLLOWED | _OFF.keys() | {"bias", "init_lora_weights"})


class PeftSettings(NamedTuple):
    """Rank and scale of each adapted layer.

    Attributes:
        rank: of the layers that `rank_pattern` does not name.
        alpha: of the layers that `alpha_pattern` does not name; any JSON value.
        rank_pattern, alpha_pattern: {regular expression for the end of a layer's name: value}; the first match wins.
        by_root: whether alpha is divided by the root of the rank (rsLoRA) instead of the rank.
    """

    rank: Any
    alpha: Any
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    by_root: bool

    def rank_of(self, layer: str) -> Any:
        """The rank that the configuration gives a layer."""
        return _first_match(self.rank_pattern, layer, self.rank)

    def alpha_of(self, layer: str) -> Any:
        """The alpha of a layer whose adapter is scaled by alpha / rank; the given value if it is no number."""
        alpha, rank = _first_match(self.alpha_pattern, layer, self.alpha), self.rank_of(layer)
        known = all(isinstance(value, int | float) and value > 0 for value in (alpha, rank))
        return alpha * math.sqrt(rank) if self.by_root and known else alpha


def read_settings(config: object, folder: str) -> PeftSettings:
    """The settings of `adapter_config.json`, which is `config`.

    Raises:
        InvalidArgument: it describes no LoRA adapter, or has a setting that is not known to leave A and B as the whole
            adapter; the message names the setting, its value and the remedy.
    """
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        refuse("path", folder, "its adapter_config.json describes no LoRA adapter")
    for name, value in config.items():
        if remedy := _remedy(name, value):
            _refuse_setting(folder, name, value, remedy)
    ranks, alphas = (_pattern_of(config, name, folder) for name in ("rank_pattern", "alpha_pattern"))
    rank, alpha = config.get("r", _DEFAULT_RANK), config.get("lora_alpha")
    return PeftSettings(rank, alpha, ranks, alphas, by_root=bool(config.get("use_rslora")))


def refuse_unused(folder: str, key: object) -> NoReturn:
    """Refuse an entry of an adapter's file that nothing would use."""
    refuse("path", folder, f"{key} belongs to no plain LoRA adapter, or to an incomplete one; {_MERGE}")


def _remedy(name: str, value: Any) -> str | None:
    """What to do about a setting; None if it leaves A and B as the whole adapter."""
    if name == "init_lora_weights":
        return None if value in _PLAIN_STARTS else _CONVERT
    if name == "bias":
        return None if value in ("none", None) else _MERGE
    if name in _ANY_VALUE | _FOLLOWED or not value:  # every other setting of PEFT is off if it is empty
        return None
    return _OFF.get(name, f"this version of dptune does not know it; {_MERGE}")


def _refuse_setting(folder: str, name: str, value: Any, remedy: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 3]}..."
    refuse("path", folder, f"PEFT's {name}={shown} makes it more than a plain LoRA adapter; {remedy}")


def _pattern_of(config: Mapping[str, Any], name: str, folder: str) -> dict[str, Any]:
    try:
        pattern = dict(config.get(name) or {})
        for key in pattern:
            re.compile(key)
    except (re.error, TypeError, ValueError):
        refuse("path", folder, f"PEFT's {name} in its adapter_config.json is damaged; save the adapter again")
    return pattern


def _first_match(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first key that matches the end of the layer's name, as PEFT matches."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
