"""The tiny model learns faster than a pretrained one, unless a rate is given."""

from __future__ import annotations

import pytest

from utils.synthetic.proxy_settings import ProxySettings


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        (ProxySettings(), 3e-3),
        (ProxySettings(model="gpt2"), 5e-5),
        (ProxySettings(learning_rate=0.1), 0.1),
        (ProxySettings(model="gpt2", learning_rate=0.1), 0.1),
    ],
)
def test_the_peak_rate_is_the_given_one_or_the_models(settings: ProxySettings, rate: float) -> None:
    assert settings.peak_rate == rate
