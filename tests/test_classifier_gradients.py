"""Every fine-tuning mode of `train_classifier.py`: each row's gradient, its norm and the clipped sum against one row at
a time, without padding, in float64."""

from __future__ import annotations

import pytest

from tests.classifiers import classifier, rows, shake
from tests.dptune.integrations.test_peft import assert_equals_the_oracle
from utils.classification.mode_defaults import MODES
from utils.classification.modes import prepare_mode


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in ("BERT", "Llama") for mode in MODES if (name, mode) != ("Llama", "bias-only")],
)
def test_each_rows_gradient_is_its_own(name: str, mode: str) -> None:
    """Llama has no biases."""
    model, trained = prepare_mode(classifier(name), mode, lora_r=2, num_prepend_tokens=3)
    model.double().eval()
    shake(model)
    assert len(trained) == sum(parameter.requires_grad for parameter in model.parameters()) > 0
    assert_equals_the_oracle(model, *rows(5, seed=7))
