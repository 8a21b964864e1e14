"""Flags make a clipping style, and a style names the flag that it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.clipping_styles import FLAT, Adaptive, Automatic, PerLayer
from utils.training.clipping_arguments import ClippingArguments

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.norm")


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


def test_clip_norms_by_pattern_the_last_one_wins() -> None:
    given = ClippingArguments(clipping="per-layer", layer_clip_norms=["*=2", "*.mlp.*=0.5"])
    assert given.style(LAYERS) == PerLayer({LAYERS[1]: 0.5, LAYERS[0]: 2.0, LAYERS[2]: 2.0})
    with pytest.raises(InvalidArgument, match=r"leaves out 1 trained layers such as model\.norm"):
        ClippingArguments(clipping="per-layer", layer_clip_norms=["*.layers.*=1"]).style(LAYERS)
