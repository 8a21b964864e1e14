"""(IA)^3's vectors: found by name, one in use, and their per-example gradients are autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

from dptune import InvalidArgument
from dptune.per_example.rescaling import is_rescaling, require_one_vector, rescaling, tap_rescaling, vectors_of

X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


def rescaled(*, feedforward: bool) -> tuple[Any, Any]:
    """(model, its one (IA)^3 layer of 6 inputs and 7 outputs), the vector away from its start."""
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 7)), config)
    (layer,) = (module for module in model.modules() if is_rescaling(module))
    for vector in vectors_of(layer).values():
        nn.init.normal_(vector)
    return model, layer


def test_plain_layers_have_no_vector() -> None:
    assert not is_rescaling(nn.Linear(2, 2))
    assert vectors_of(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("feedforward", [False, True])
def test_each_examples_gradient_is_autograds(feedforward: bool) -> None:
    model, layer = rescaled(feedforward=feedforward)
    caught: list[Tensor] = []

    def tap(product: Tensor, factor: Tensor) -> Tensor:
        product = product * 1.0
        caught.append(factor.detach())
        product.register_hook(caught.append)
        return product

    handles = tap_rescaling(layer, tap)
    with torch.no_grad():
        model(X)
    assert not caught, "nothing is caught where no gradient is"
    weights = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1))
    (model(X) * weights).sum().backward()
    factor, grad = caught
    for handle in handles:
        handle.remove()
    ((name, vector),) = vectors_of(layer).items()
    found = rescaling(layer, factor, grad)[name]
    for example in range(4):
        (wanted,) = torch.autograd.grad((model(X[example]) * weights[example]).sum(), [vector])
        torch.testing.assert_close(found[example], wanted)


def test_a_second_vector_in_one_layer_is_refused() -> None:
    model, layer = rescaled(feedforward=False)
    require_one_vector(layer, "layer")
    model.add_adapter("other", IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(InvalidArgument, match=r"^layer='default, other': several \(IA\)\^3 vectors"):
        require_one_vector(layer, "layer")


@pytest.mark.parametrize("how", ["merge", "enable_adapters"])
def test_a_vector_that_is_not_in_use_is_refused(how: str) -> None:
    _, layer = rescaled(feedforward=False)
    layer.merge() if how == "merge" else layer.enable_adapters(False)
    with pytest.raises(InvalidArgument, match=r"^layer='default': .*merged or switched off"):
        require_one_vector(layer, "layer")
