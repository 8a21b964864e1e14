"""Whole models that compute in float16: norms and clipped sums are the float64 oracle's, to float16's rounding.

Weights are float32, losses run under autocast, and a constant scale keeps small gradients. The scale is gone before a
gradient is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dptune import CausalLMLoss, Ledger, PrivateStep, deal
from dptune.clipping_styles import Adaptive, Clipping, Flat, PerLayer
from dptune.flat import released_size
from dptune.sharding import shard
from tests.examples import padded, random_examples
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.reference import clipped_sum, example_gradients, flat
from tests.whole_models import CAUSAL, whole_model
from utils.cli.launch import loss_scale
from utils.models.sharded import decoder_layers
from utils.models.trainable import in_autocast

CPU, COUNT = torch.device("cpu"), 8
EXAMPLES = random_examples(COUNT, seed=3)
LENGTHS = np.array([len(ids) for ids, _ in EXAMPLES])
SCALE = loss_scale(torch.float16, whole=True)
ROUNDING = 1e-2  # of a gradient's length; float16 rounds each number by up to 5e-4
DUMMY = (torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100))


class InFloat16:
    """A noiseless step of a whole model, and its losses."""

    def __init__(
        self,
        model: Any,
        ledger: Path,
        *,
        clip_norm: float = 1e6,
        clipping: Clipping = Flat(),  # noqa: B008
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, config = model, replace(config_for(COUNT, clip_norm=clip_norm), clipping=clipping)
        self.parameters = list(model.parameters())  # before a forward pass gathers shards
        self.divisor, self.losses = config.divisor, in_autocast(CausalLMLoss(model), torch.float16, CPU)
        noise: Any = NoNoise(released_size(model, config, rank))
        self.step = PrivateStep(
            model,
            config,
            ledger=Ledger(ledger),
            noise=noise,
            loss_scale=SCALE,
            rank=rank,
            world_size=world_size,
            gather=gather,
        )

    def released(self) -> Tensor:
        """The sum that the last step released, flat float64."""
        grads: list[Any] = [parameter.grad for parameter in self.parameters]
        whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
        return torch.cat([grad.flatten().double() for grad in whole]) * self.divisor

    def sum_of(self, rows: Sequence[int], weights: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """(sum, norms [B]) of a step on these examples in one micro-batch."""
        losses = self.losses(*padded([EXAMPLES[row] for row in rows]))
        norms = self.step.backward(losses if weights is None else losses * torch.tensor(weights)).norms
        self.step.finish()
        return self.released(), norms


def norms_of(gradients: Sequence[dict[str, Tensor]]) -> Tensor:
    return torch.stack([flat(own).norm() for own in gradients])


@pytest.mark.parametrize("name", CAUSAL)
def test_clipped_sums_and_norms_are_those_of_the_oracle(name: str, tmp_path: Path) -> None:
    model = whole_model(name).float()
    exact = example_gradients(model, EXAMPLES)
    norms = norms_of(exact)
    for number, clip_norm in enumerate((float(norms.max()) * 2, float(norms.median()), float(norms.min()) / 8)):
        with (own := InFloat16(model, tmp_path / f"{number}.jsonl", clip_norm=clip_norm)).step:
            found, measured = own.sum_of(range(COUNT))
        wanted = clipped_sum(exact, clip_norm, len(found))
        torch.testing.assert_close(measured, norms, rtol=ROUNDING, atol=0)
        assert (found - wanted).norm() < ROUNDING * wanted.norm()


@pytest.mark.parametrize("clipping", [Flat(), PerLayer()])
def test_a_clipped_example_adds_its_clip_norm_and_no_more(clipping: Clipping, tmp_path: Path) -> None:
    """What is summed is what was measured, so float16's rounding cannot lengthen a clipped gradient."""
    with (own := InFloat16(whole_model("GPT-2").float(), tmp_path / "l", clip_norm=0.01, clipping=clipping)).step:
        for row in range(COUNT):
            found, _ = own.sum_of([row])
            assert 0.0099 < float(found.norm()) <= 0.01 * (1 + 1e-6)


def test_an_example_that_overflows_adds_nothing_and_changes_no_other(tmp_path: Path) -> None:
    with (own := InFloat16(whole_model("Llama, tied").float(), tmp_path / "ledger.jsonl", clip_norm=0.5)).step:
        found, norms = own.sum_of(range(COUNT), [1, 1, 2.0**14, 1, 1, 1, 1, 1])
        assert not norms[2].isfinite()
        assert found.isfinite().all()
        without, others = own.sum_of(range(COUNT), [1, 1, 0, 1, 1, 1, 1, 1])
    assert torch.equal(found, without)
    rest = torch.arange(COUNT) != 2
    assert torch.equal(norms[rest], others[rest])


def test_a_row_that_only_fills_up_never_counts_even_if_it_overflows(tmp_path: Path) -> None:
    """Otherwise an example in its place would change the count of adaptive clipping twice as much as is noised."""
    model = whole_model("Llama").float()
    counts = []
    for weight in (0.0, 2.0**14):
        own = InFloat16(model, tmp_path / f"{weight}.jsonl", clip_norm=0.5, clipping=Adaptive(count_noise=5.0))
        with own.step:
            losses = own.losses(*padded(EXAMPLES)) * torch.tensor([1.0] * (COUNT - 1) + [weight])
            own.step.backward(losses, items=range(COUNT - 1))
            own.step.finish()
        counts.append(own.step.clip_norm)
    assert counts[0] == counts[1]


def sharded_sums(rank: int, gather: Callable[[Tensor], Tensor], folder: Path) -> list[Tensor]:
    """The sums of two processes, with clipping inactive, mixed and active."""
    model = whole_model("Llama, tied").float()
    shard(model.requires_grad_(False), decoder_layers(model), device=CPU)
    model.requires_grad_(True)
    found = []
    for clip_norm in (1e6, 2.0, 0.01):
        ledger = folder / f"{clip_norm}.jsonl"
        own = InFloat16(model, ledger, clip_norm=clip_norm, rank=rank, world_size=2, gather=gather)
        with own.step:
            for rows in deal(np.arange(COUNT), LENGTHS, token_budget=48, ranks=2)[rank]:
                own.step.backward(own.losses(*(padded([EXAMPLES[row] for row in rows]) if len(rows) else DUMMY)))
            own.step.finish()
            found.append(own.released())
    return found


def test_sharded_weights_have_the_oracles_sums_too(tmp_path: Path) -> None:
    exact = example_gradients(whole_model("Llama, tied").float(), EXAMPLES)
    for sums in run_processes(2, sharded_sums, tmp_path):
        for found, clip_norm in zip(sums, (1e6, 2.0, 0.01), strict=True):
            wanted = clipped_sum(exact, clip_norm, len(found))
            assert (found - wanted).norm() < ROUNDING * wanted.norm()
