"""A whole private step: against the oracle, its noise, its order, and with any number of ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dptune import (
    CausalLMLoss,
    GaussianNoise,
    InvalidArgument,
    Keystream,
    Ledger,
    PrivacyConfig,
    PrivateStep,
    add_lora,
    deal,
)
from tests.examples import padded, random_examples, randomise_adapters
from tests.private_sum import NoNoise, config_for, private_sum
from tests.ranks import run_ranks
from tests.reference import clipped_sum, example_gradients, flat
from tests.tiny import tiny_llama

EXAMPLES = random_examples(12, seed=1)


def adapted(rank: int = 4, targets=("q_proj", "k_proj", "v_proj", "o_proj")) -> nn.Module:
    model = tiny_llama()
    add_lora(model, rank=rank, alpha=2.0 * rank, targets=targets)
    randomise_adapters(model)
    return model


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture(scope="module")
def gradients():
    return example_gradients(adapted(), EXAMPLES)


@pytest.mark.parametrize("clipping", ["inactive", "active", "mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_the_sum_equals_the_oracles(gradients, clipping, checkpointing, token_budget):
    norms = sorted(flat(grads).norm().item() for grads in gradients)
    clip_norm = {"inactive": 2 * norms[-1], "active": norms[0] / 2, "mixed": norms[len(norms) // 2]}[clipping]
    model = adapted()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = config_for(12, clip_norm=clip_norm)
    found = private_sum(model, EXAMPLES, range(12), config, token_budget=token_budget)
    expected = clipped_sum(gradients, clip_norm, size_of(model))
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("rank", "targets"), [(1, ("q_proj",)), (16, ("q_proj", "v_proj")), (4, ("o_proj", "lm_head"))]
)
def test_the_sum_equals_the_oracles_for_other_adapters(rank, targets):
    model = adapted(rank, targets)
    gradients = example_gradients(model, EXAMPLES)
    clip_norm = float(np.median([flat(grads).norm() for grads in gradients]))
    found = private_sum(model, EXAMPLES, range(12), config_for(12, clip_norm=clip_norm))
    expected = clipped_sum(gradients, clip_norm, size_of(model))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_step_with_noise_is_the_sum_plus_scaled_noise_over_the_expected_batch_size(tmp_path):
    model, config = adapted(), config_for(12, clip_norm=0.05, expected_batch_size=5.0)
    noise = GaussianNoise(size_of(model), Keystream.for_tests(1))
    with PrivateStep(model, config, ledger=Ledger(tmp_path / "ledger.jsonl"), noise=noise) as step:
        step.backward(CausalLMLoss(model)(*padded(EXAMPLES)))
        step.finish()
    released = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()
    with GaussianNoise(size_of(model), Keystream.for_tests(1)) as same_noise:
        expected = clipped_sum(example_gradients(adapted(), EXAMPLES), 0.05, size_of(model))
        expected += config.noise_std * same_noise.take()
    grid = config.grid()
    assert (5.0 * released - expected).abs().max() < 0.51 * grid
    assert (5.0 * released / grid - (5.0 * released / grid).round()).abs().max() < 1e-3, "multiples of the grid"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_who_keeps_a_gradient_never_sees_the_next_steps_sum_before_its_noise(tmp_path, dtype):
    """`.grad` must not lie in memory that the next step adds up in, in float64 either."""
    model, config = adapted().to(dtype), config_for(12, clip_norm=0.05)
    losses = CausalLMLoss(model)
    with PrivateStep(model, config, ledger=Ledger(tmp_path / "ledger.jsonl")) as step:
        step.finish()
        kept = [parameter.grad for parameter in step._recorder.parameters.values()]
        copies = [grad.clone() for grad in kept]
        for _ in range(2):
            step.backward(losses(*padded(EXAMPLES)))
            assert all(torch.equal(grad, copy) for grad, copy in zip(kept, copies, strict=True))
            step.finish()
    assert all(torch.equal(grad, copy) for grad, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_release_the_same_noiseless_sum(tmp_path, gradients, world_size):
    config = config_for(12, clip_norm=0.05)
    lengths = np.array([len(ids) for ids, _ in EXAMPLES])
    dealt = deal(np.arange(12), lengths, token_budget=60, ranks=world_size)
    models = [adapted() for _ in range(world_size)]  # here, because torch's seed is not per thread

    def work(rank, gather):
        model = models[rank]
        ledger = Ledger(tmp_path / "ledger.jsonl") if rank == 0 else None
        step = PrivateStep(
            model, config, ledger=ledger, noise=NoNoise(size_of(model)), gather=gather, rank=rank, world_size=world_size
        )
        dummy = (torch.zeros((1, 2), dtype=torch.long), torch.full((1, 2), -100))
        with step:
            for rows in dealt[rank]:
                step.backward(CausalLMLoss(model)(*(padded([EXAMPLES[row] for row in rows]) if len(rows) else dummy)))
            step.finish()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    released = run_ranks(world_size, work)
    assert all(torch.equal(released[0], other) for other in released)
    expected = clipped_sum(gradients, 0.05, len(released[0])) / config.expected_batch_size
    assert (released[0].double() - expected).norm() < 1e-5 * expected.norm()
    assert Ledger(tmp_path / "ledger.jsonl").steps == 1


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_total_noise_is_sigma_c_for_any_number_of_ranks_and_ranks_differ(tmp_path, world_size):
    config = config_for(100, clip_norm=0.7, expected_batch_size=10.0)

    def work(rank, gather):
        model = nn.Linear(100, 300, bias=False)
        ledger = Ledger(tmp_path / "ledger.jsonl") if rank == 0 else None
        sent = []

        def spying(share):
            sent.append(share.clone())
            return gather(share)

        with PrivateStep(model, config, ledger=ledger, gather=spying, rank=rank, world_size=world_size) as step:
            step.finish()  # an empty draw is a step too: noise alone
        return model.weight.grad.flatten(), sent

    results = run_ranks(world_size, work)
    for share in (share.double() / config.grid() for _, sent in results for share in sent):
        assert torch.equal(share, share.round()), "all ranks use one grid, so that their sum tells no share"
    total = results[0][0].double() * config.divisor / (config.noise_multiplier * 0.7)
    n = len(total)
    assert abs(total.mean()) < 6 / n**0.5
    assert abs(total.square().mean() - 1) < 6 * (2 / n) ** 0.5
    if world_size > 1:
        shares = torch.stack([sent[0] for _, sent in results]).double()
        correlation = torch.corrcoef(shares) - torch.eye(world_size)
        assert correlation.abs().max() < 6 / n**0.5
        assert len({share.square().mean().item() for share in shares}) == world_size


def test_steps_have_independent_noise_and_each_is_in_the_ledger(tmp_path):
    model, config = nn.Linear(100, 300, bias=False), config_for(100, clip_norm=1.0)
    released = []
    with PrivateStep(model, config, ledger=Ledger(tmp_path / "ledger.jsonl")) as step:
        for _ in range(3):
            step.finish()
            released.append(model.weight.grad.flatten().clone())
    assert (torch.corrcoef(torch.stack(released)) - torch.eye(3)).abs().max() < 6 / 30_000**0.5
    assert Ledger(tmp_path / "ledger.jsonl").steps == 3


def test_seeding_torch_changes_no_noise(tmp_path):
    released = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        model = nn.Linear(10, 10, bias=False)
        with PrivateStep(model, config_for(10, clip_norm=1.0), ledger=Ledger(tmp_path / "ledger.jsonl")) as step:
            step.finish()
        released.append(model.weight.grad)
    assert not torch.equal(*released)


def test_the_ledger_line_is_on_disk_before_any_rank_has_the_gradient(tmp_path):
    path = tmp_path / "ledger.jsonl"
    model = nn.Linear(4, 4)
    seen = []

    def gather(share):
        seen.append(len(path.read_text().splitlines()))
        return torch.cat([share, share])

    with PrivateStep(
        model, config_for(10, clip_norm=1.0), ledger=Ledger(path), gather=gather, rank=0, world_size=2
    ) as step:
        step.finish()
    assert seen == [1]


def test_a_gradient_whose_ledger_line_cannot_be_written_is_not_used(tmp_path):
    model = nn.Linear(4, 4)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    (tmp_path / "ledger.jsonl").mkdir()
    with PrivateStep(model, config_for(10, clip_norm=1.0), ledger=ledger) as step, pytest.raises(OSError):  # noqa: PT011
        step.finish()
    assert model.weight.grad is None


def test_a_gather_in_slices_equals_a_gather_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dptune.ranks._GATHERED_ELEMENTS", 7)
    config = config_for(10, clip_norm=1.0)
    models = [nn.Linear(5, 4), nn.Linear(5, 4)]

    def work(rank, gather):
        model, x = models[rank], torch.ones(1, 5)
        ledger = Ledger(tmp_path / "ledger.jsonl") if rank == 0 else None
        step = PrivateStep(model, config, ledger=ledger, noise=NoNoise(24), gather=gather, rank=rank, world_size=2)
        with step:
            step.backward(model(x * (rank + 1)).sum(1) * 1e-3)
            step.finish()
        return torch.cat([model.weight.grad.flatten(), model.bias.grad])

    one, other = run_ranks(2, work)
    assert torch.equal(one, other)
    expected = torch.cat([torch.full((20,), 3e-3), torch.full((4,), 2e-3)]) / config.divisor
    torch.testing.assert_close(one, expected)


def test_no_runtime_setting_is_part_of_what_decides_epsilon():
    """Micro-batch size and checkpointing change no sum (see above), so they are not fields here."""
    assert set(PrivacyConfig.__dataclass_fields__) == {
        "num_examples",
        "expected_batch_size",
        "steps",
        "clip_norm",
        "noise_multiplier",
        "delta",
        "clipping",
        "group_size",
        "parts",
        "max_batch",
        "noise_bands",
    }


def test_an_example_with_a_gradient_that_is_not_finite_contributes_nothing(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(3, 3)
    x[1, 0] = float("inf")
    config = config_for(10, clip_norm=1e-3)
    released = []
    for rows in (x, x[[0, 2]]):
        copied = copy.deepcopy(model)
        with PrivateStep(copied, config, ledger=Ledger(tmp_path / "ledger.jsonl"), noise=NoNoise(8)) as step:
            step.backward(copied(rows).sum(1))
            step.finish()
        released.append(copied.weight.grad)
    assert torch.isfinite(released[0]).all()
    torch.testing.assert_close(*released)


def test_mistakes_are_refused(tmp_path):
    model, config = adapted(), config_for(12, clip_norm=1.0)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(InvalidArgument, match="rank 0 must record"):
        PrivateStep(model, config, ledger=None)
    for rank in (1, -1, 0.5):  # without a ledger, it would release a gradient that no line records
        with pytest.raises(InvalidArgument, match=rf"^rank={rank}: must be from 0 to 0, below world_size"):
            PrivateStep(model, config, ledger=None, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="2 processes need one"):
        PrivateStep(model, config, ledger=ledger, world_size=2)
    with pytest.raises(InvalidArgument, match="no trainable parameter"):
        PrivateStep(tiny_llama().requires_grad_(False), config, ledger=ledger)
    losses = CausalLMLoss(model)(*padded(EXAMPLES))
    with PrivateStep(model, config, ledger=ledger) as step:
        with pytest.raises(InvalidArgument, match="one loss per example"):
            step.backward(losses.mean())
        with pytest.raises(RuntimeError, match="2 losses but 12 examples"):
            step.backward(CausalLMLoss(model)(*padded(EXAMPLES)).view(2, 6).sum(1))
    with PrivateStep(model, config, ledger=ledger) as step, pytest.raises(RuntimeError, match="inside `with step:`"):
        step.backward(losses)


class _Scale(nn.Module):
    """A parameter of the loss that is not part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("part", ["of the loss", "unfrozen"])
def test_a_gradient_that_is_not_recorded_is_refused(part, tmp_path):
    """An optimizer with such a parameter would silently get its plain gradient."""
    model, scale = adapted(), _Scale()
    with PrivateStep(model, config_for(12, clip_norm=0.1), ledger=Ledger(tmp_path / "ledger")) as step:
        if part == "unfrozen":
            model.lm_head.weight.requires_grad_(True)
        losses = CausalLMLoss(model)(*padded(EXAMPLES[:2]))
        step.add_nothing()  # a micro-batch that did not fit in memory was not looked at
        with pytest.raises(InvalidArgument, match="outside the model" if part == "of the loss" else r"lm_head\.weight"):
            step.backward(losses * scale.weight if part == "of the loss" else losses)


def test_a_gradient_of_a_frozen_parameter_is_not_handed_to_the_optimizer(tmp_path):
    """A gradient that appeared during a step, or was left from before."""
    model, ledger = adapted(), Ledger(tmp_path / "ledger")
    with PrivateStep(model, config_for(12, clip_norm=0.1), ledger=ledger) as step:
        step.backward(CausalLMLoss(model)(*padded(EXAMPLES[:2])))
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        with pytest.raises(InvalidArgument, match=r"lm_head\.weight=.* set it to None"):
            step.finish()
        assert ledger.steps == 0
        model.lm_head.weight.grad = None
        step.finish()
        assert ledger.steps == 1


def test_the_module_leaves_the_model_trainable_and_closes_its_thread(tmp_path: Path):
    model = adapted()
    step = PrivateStep(model, config_for(12, clip_norm=1.0), ledger=Ledger(tmp_path / "ledger.jsonl"))
    with step:
        assert size_of(model) == 0
    assert size_of(model) > 0
    with pytest.raises(RuntimeError):
        step.finish()
