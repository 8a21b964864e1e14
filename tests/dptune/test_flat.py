"""A step's flat vector: its size, and each parameter's part of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dptune import InvalidArgument
from dptune.clipping_styles import Adaptive
from dptune.flat import released_size, views
from tests.private_sum import config_for

CONFIG = config_for(12, clip_norm=1.0)


def test_a_step_releases_each_trainable_value_and_the_count_of_adaptive_clipping() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    model[1].requires_grad_(False)
    assert released_size(model, CONFIG) == 3 * 2 + 2
    assert released_size(model, replace(CONFIG, clipping=Adaptive(count_noise=5.0))) == 3 * 2 + 2 + 1


def test_a_model_without_a_trainable_parameter_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no trainable parameter"):
        released_size(nn.Linear(3, 2).requires_grad_(False), CONFIG)


def test_each_parameter_has_its_part_in_its_shape_and_in_place() -> None:
    parameters = {"weight": nn.Parameter(torch.zeros(2, 3)), "bias": nn.Parameter(torch.zeros(2))}
    flat_P = torch.arange(9.0)  # the last value belongs to no parameter, as adaptive clipping's count
    parts = views(parameters, flat_P)
    assert list(parts) == ["weight", "bias"]
    assert parts["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parts["bias"].tolist() == [6, 7]
    parts["bias"] += 10
    assert flat_P.tolist() == [0, 1, 2, 3, 4, 5, 16, 17, 8]
