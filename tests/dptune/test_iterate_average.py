"""The average of the weights is what its definition says, and the trained weights do not feel it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument
from dptune.averaging import NO_AVERAGE, Averaging
from dptune.iterate_average import IterateAverage
from dptune.sharding import shard
from tests.processes import run_processes
from tests.whole_models import whole_model
from utils.models.sharded import decoder_layers

STEPS = 12
EMA, LAST = Averaging(ema=0.8), Averaging(average_last=0.4)


def weights_after(step: int, like: Tensor) -> Tensor:
    """Made-up weights."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(like.dtype)


def a_model(dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(5, 3).to(dtype)
    model.bias.requires_grad_(False)
    return model


def averaged(averaging: Averaging, *, until: int = STEPS, model: nn.Linear | None = None) -> IterateAverage:
    """After so many of STEPS steps."""
    model = model or a_model()
    average = IterateAverage(model, averaging, STEPS)
    for step in range(1, until + 1):
        model.weight.data.copy_(weights_after(step, model.weight))
        average.add(step)
    return average


def expected(averaging: Averaging, like: Tensor, until: int = STEPS) -> Tensor:
    """The average from its definition, in float64."""
    found = torch.zeros_like(like, dtype=torch.float64)
    steps = [weights_after(step, like).double() for step in range(1, until + 1)]
    if averaging.average_last is not None:
        return torch.stack(steps[7:]).mean(0)  # the last 5 of 12
    for before, iterate in enumerate(steps):
        decay = min(0.8, (1 + before) / (10 + before)) if before else 0.0
        found = decay * found + (1 - decay) * iterate
    return found


@pytest.mark.parametrize("averaging", [EMA, LAST], ids=["exponential", "last"])
def test_it_is_the_average_of_the_weights_after_the_steps(averaging: Averaging) -> None:
    average = averaged(averaging)
    assert list(average.tensors) == ["weight"], "what is trained"
    torch.testing.assert_close(average.tensors["weight"].double(), expected(averaging, average.tensors["weight"]))
    assert (average.count, average.step) == ((12, 12) if averaging is EMA else (5, 12))
    assert average.in_words(STEPS) == averaging.in_words(STEPS, STEPS)


@pytest.mark.parametrize(("averaging", "until"), [(NO_AVERAGE, STEPS), (LAST, 7), (EMA, 0)])
def test_before_a_step_counts_the_model_keeps_its_weights(averaging: Averaging, until: int) -> None:
    model = a_model()
    average = averaged(averaging, until=until, model=model)
    kept = model.weight.detach().clone()
    with average.in_model():
        assert torch.equal(model.weight, kept)
    average.put_in()
    assert torch.equal(model.weight, kept)
    assert (average.count, average.step, average.tensors, average.in_words(until)) == (0, 0, {}, None)


def test_the_model_has_the_average_in_the_block_and_its_own_weights_after_it_to_the_bit() -> None:
    model = a_model()
    average = averaged(EMA, model=model)
    before, kept = model.weight.detach().clone(), average.tensors["weight"].clone()
    with average.in_model():
        assert torch.equal(model.weight, kept)
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)
    with pytest.raises(ZeroDivisionError), average.in_model():
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)
    assert torch.equal(average.tensors["weight"], kept), "and the average is as it was"
    average.put_in()
    assert torch.equal(model.weight, kept)


def test_the_average_of_bfloat16_weights_is_kept_in_float32() -> None:
    model = a_model(torch.bfloat16)
    average = averaged(EMA, model=model)
    found, before = average.tensors["weight"], model.weight.detach().clone()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(EMA, before), rtol=1e-6, atol=1e-6)
    with average.in_model():
        assert torch.equal(model.weight, found.bfloat16())
    assert torch.equal(model.weight, before)
    assert averaged(EMA, model=a_model(torch.float64)).tensors["weight"].dtype == torch.float64


@pytest.mark.parametrize(("averaging", "until"), [(EMA, 4), (LAST, 9), (LAST, 5)])
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(averaging: Averaging, until: int) -> None:
    saved, model = averaged(averaging, until=until), a_model()
    resumed = IterateAverage(model, averaging, STEPS)
    assert resumed.resume(until, saved.count) is bool(saved.count)
    assert (resumed.count, resumed.step, resumed.tensors.keys()) == (saved.count, saved.step, saved.tensors.keys())
    for name, tensor in resumed.tensors.items():
        tensor.copy_(saved.tensors[name])
    for step in range(until + 1, STEPS + 1):
        model.weight.data.copy_(weights_after(step, model.weight))
        resumed.add(step)
    assert torch.equal(resumed.tensors["weight"], averaged(averaging).tensors["weight"])


def test_an_average_over_other_steps_is_not_resumed() -> None:
    """More steps are planned now."""
    saved = averaged(LAST, until=10)
    later, other = (IterateAverage(a_model(), LAST, steps) for steps in (40, 15))
    assert later.resume(10, saved.count) is False
    assert later.count == 0, "it begins at step 25"
    with pytest.raises(InvalidArgument, match=r"^average_last=0.4: .* over 3 steps, but .* 15 planned steps .* 1; "):
        other.resume(10, saved.count)


# --- shards ---


def set_weights(model: nn.Module, step: int) -> None:
    """The same on any number of ranks."""
    for parameter in model.parameters():
        own: Any = parameter
        whole = weights_after(step, torch.empty(parameter.shape, dtype=parameter.dtype)) / 10
        rows = (
            whole.chunk(own.device_mesh.size())[own.device_mesh.get_local_rank()] if hasattr(own, "to_local") else whole
        )
        (own.to_local() if hasattr(own, "to_local") else own).data.copy_(rows)


@torch.no_grad()
def outputs(model: Any, averaging: Averaging) -> tuple[Tensor, Tensor, Tensor]:
    """What the model gives with its weights, with their average in it, and then with its weights again."""
    ids, average = torch.arange(12).view(2, 6), IterateAverage(model, averaging, STEPS)
    for step in range(1, STEPS + 1):
        set_weights(model, step)
        average.add(step)
    first = model(ids).logits  # an evaluation, which leaves shards gathered
    with average.in_model():
        second = model(ids).logits
    return first, second, model(ids).logits


def with_shards(_rank: int, _gather: Any, _folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    model = whole_model("Llama, tied").requires_grad_(False)
    shard(model, decoder_layers(model), device=torch.device("cpu"))
    return outputs(model.requires_grad_(True), EMA)


def test_ranks_average_their_shards_and_compute_with_them(tmp_path: Path) -> None:
    """Also where a pass has left gathered weights behind."""
    own, with_average, again = outputs(whole_model("Llama, tied"), EMA)
    assert torch.equal(own, again)
    assert not torch.allclose(own, with_average)
    for found in run_processes(2, with_shards, tmp_path):
        for tensor, wanted in zip(found, (own, with_average, own), strict=True):
            torch.testing.assert_close(tensor, wanted)
