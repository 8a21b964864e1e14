"""The step on 1, 2 and 4 real processes, with or without sharded frozen weights, equals the step on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from dptune import (
    CausalLMLoss,
    GaussianNoise,
    Keystream,
    Ledger,
    PoissonSampler,
    PrivateStep,
    accounting,
    add_lora,
    deal,
    trainable_parameters,
)
from dptune.ranks import require_equal
from tests.examples import padded, random_examples, randomise_adapters
from tests.private_sum import NoNoise, config_for, private_sum
from tests.processes import run_processes
from utils.cli.launch import Sharding
from utils.models.loading import checkpoint_activations, load_model

COUNT, CLIP_NORM, STEPS = 40, 0.5, 6
EXAMPLES = random_examples(COUNT, seed=3)
LENGTHS = np.array([len(ids) for ids, _ in EXAMPLES])
TARGETS = ("q_proj", "v_proj", "lm_head")
Gather = Callable[[Tensor], Tensor]


def adapted(
    folder: Path, *, sharded: bool, checkpointing: bool = False, targets: tuple[str, ...] = TARGETS
) -> nn.Module:
    sharding = Sharding() if sharded else None
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), sharding=sharding)
    add_lora(model, rank=4, targets=targets)
    randomise_adapters(model)
    if checkpointing:
        checkpoint_activations(model.train())
    return model


def released(parameters: list[nn.Parameter]) -> Tensor:
    """The gradients that the last step wrote, flat."""
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def draws(seed: int = 5) -> list[np.ndarray]:
    """Poisson draws, including an empty one and one smaller than the number of ranks."""
    sampler = PoissonSampler(COUNT, 0.5, Keystream.for_tests(seed))
    return [sampler.draw(), np.array([], dtype=np.int64), np.array([7]), *(sampler.draw() for _ in range(STEPS - 3))]


def one_run(
    rank: int, gather: Gather, world_size: int, how: dict[str, Any], folder: Path, ledger: Path
) -> dict[str, Any]:
    """Noiseless sums of `draws`, then noise alone, on one rank."""
    model = adapted(folder, **how)
    config = config_for(COUNT, clip_norm=CLIP_NORM)
    ranks: dict[str, Any] = {"gather": gather, "rank": rank, "world_size": world_size}
    parameters = trainable_parameters(model)
    size = sum(parameter.numel() for parameter in parameters)
    losses = CausalLMLoss(model)
    sums = []
    with PrivateStep(model, config, ledger=Ledger(ledger), noise=NoNoise(size), **ranks) as step:
        for draw in draws():
            for rows in deal(draw, LENGTHS, token_budget=64, ranks=world_size)[rank]:
                dummy = (torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100))
                step.backward(losses(*(padded([EXAMPLES[row] for row in rows]) if len(rows) else dummy)))
            step.finish()
            sums.append(released(parameters) * config.divisor)
    shares, totals = [], []
    with PrivateStep(model, config, ledger=Ledger(ledger), noise=Recorded(size, shares), **ranks) as step:
        for _ in range(STEPS):  # empty draws release noise alone
            step.finish()
            totals.append(released(parameters) * config.divisor)
    require_equal(parameters, gather)
    return {"sums": sums, "shares": torch.stack(shares), "totals": torch.stack(totals), "noise_std": config.noise_std}


class Recorded(GaussianNoise):
    """Real noise that keeps its values."""

    def __init__(self, size: int, shares: list[Tensor]) -> None:
        super().__init__(size)
        self._shares = shares

    def parts(self) -> Iterator[Tensor]:
        parts = [part.clone() for part in super().parts()]
        self._shares.append(torch.cat(parts).clone())
        yield from parts


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> list[Tensor]:
    """The sums of `draws` from one process without sharding, float64."""
    model = adapted(tiny_model_dir, sharded=False)
    return [private_sum(model, EXAMPLES, draw, config_for(COUNT, clip_norm=CLIP_NORM)) for draw in draws()]


SETTINGS = [
    (1, {"sharded": True}),
    (2, {"sharded": False}),
    (2, {"sharded": True, "checkpointing": True}),
    (4, {"sharded": False}),
    (4, {"sharded": True}),
]


@pytest.fixture(
    scope="module", params=SETTINGS, ids=lambda setting: f"{setting[0]}-{'-'.join(setting[1])}-{setting[1]['sharded']}"
)
def run(request, tiny_model_dir, tmp_path_factory) -> tuple[int, list[dict[str, Any]], Ledger]:
    world_size, how = request.param
    ledger = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    return world_size, run_processes(world_size, one_run, world_size, how, tiny_model_dir, ledger), Ledger(ledger)


def test_the_sum_is_that_of_one_process(run, alone):
    _, ranks, _ = run
    for got, wanted in zip(ranks[0]["sums"], alone, strict=True):
        assert (got - wanted).norm() <= 1e-6 * max(wanted.norm(), 1e-30)


def test_every_rank_gets_it_to_the_bit(run):
    _, ranks, _ = run
    for other in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0]["sums"], other["sums"], strict=True))
        assert torch.equal(ranks[0]["totals"], other["totals"])


def test_the_ledger_counts_each_step_once(run):
    _, _, ledger = run
    assert ledger.steps == 2 * STEPS
    assert ledger.cost(1e-5).epsilon == pytest.approx(_epsilon_of(2 * STEPS))


def test_the_total_noise_has_the_stated_variance(run):
    _, ranks, _ = run
    values = ranks[0]["totals"].double() / ranks[0]["noise_std"]
    low, high = stats.chi2.ppf([1e-9, 1 - 1e-9], values.numel())
    assert low < values.square().sum() < high


def test_noise_differs_between_ranks_and_steps(run):
    world_size, ranks, _ = run
    vectors = torch.cat([rank["shares"] for rank in ranks]).double()  # [world * steps, P]
    assert len(vectors) == world_size * STEPS
    correlations = torch.corrcoef(vectors) - torch.eye(len(vectors))
    assert correlations.abs().max() < 6 / vectors.shape[1] ** 0.5


def _epsilon_of(steps: int) -> float:
    config = config_for(COUNT, clip_norm=CLIP_NORM)
    return accounting.epsilon(
        noise_multiplier=config.noise_multiplier,
        sampling_probability=config.sampling_probability,
        steps=steps,
        delta=1e-5,
    )
