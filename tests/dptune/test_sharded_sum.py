"""Whole models whose trained weights are sharded over 1 to 4 real processes: a step is that of one process.

Each rank's shards hold the whole noise, once, and no rank has a gradient that the ledger lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from scipy import stats
from torch import Tensor, nn

from dptune import (
    CausalLMLoss,
    InvalidArgument,
    Ledger,
    PrivacyConfig,
    PrivateStep,
    deal,
    sharded_sum,
    trainable_parameters,
)
from dptune.clipping_styles import Adaptive, Automatic, Clipping, Flat, PerLayer
from dptune.flat import released_size
from dptune.noise import GaussianNoise
from dptune.optimizers import DPAdam, LowPassAdam
from dptune.plain_step import PlainStep
from dptune.sharding import local_part, reshard, shard
from tests.examples import padded, random_examples
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.whole_models import whole_model
from utils.models.loading import checkpoint_activations
from utils.models.sharded import decoder_layers
from utils.models.trainable import choose_trainable

CPU = torch.device("cpu")
COUNT, CLIP_NORM = 12, 0.5
EXAMPLES = random_examples(COUNT, seed=3)
LENGTHS = np.array([len(ids) for ids, _ in EXAMPLES])
DRAWS = [np.arange(COUNT), np.array([], dtype=np.int64), np.array([7]), np.array([1, 2, 5, 8, 11])]
DUMMY = (torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100))
Gather = Callable[[Tensor], Tensor]

# (model, trained parameters, clipping style, whether each rank keeps a whole sum)
CASES: dict[str, tuple[str, str, Clipping, bool]] = {
    "GPT-2": ("GPT-2", "all", Flat(), False),
    "GPT-2, kept whole": ("GPT-2", "all", Flat(), True),
    "Llama, tied": ("Llama, tied", "all", Flat(), False),
    "Llama, recomputed": ("Llama", "all", Flat(), False),
    "GPT-2, offloaded": ("GPT-2", "all", Flat(), False),
    "norms alone": ("Llama", "norms", Flat(), False),
    "per layer": ("Llama", "all", PerLayer(), True),
    "automatic": ("GPT-2", "all", Automatic(), False),
    "adaptive": ("Llama, tied", "all", Adaptive(count_noise=5.0), False),
    "adaptive, kept whole": ("Llama", "all", Adaptive(count_noise=5.0), True),
}
NAMES = list(CASES)


def model_of(name: str, *, sharded: bool) -> nn.Module:
    """A tiny model in float64, whose rows do not divide evenly over 3 ranks."""
    kind, trained, *_ = CASES[name]
    model = whole_model(kind)
    if sharded:
        shard(model.requires_grad_(False), decoder_layers(model), device=CPU, cpu_offload="offloaded" in name)
    choose_trainable(model, [trained])
    if "recomputed" in name:
        checkpoint_activations(model.train())  # there is no dropout
    return model


def config_of(clipping: Clipping) -> PrivacyConfig:
    return replace(config_for(COUNT, clip_norm=CLIP_NORM), clipping=clipping)


def whole(value: Tensor | None) -> Tensor:
    assert value is not None
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The last step's gradients of all ranks, flat. Every rank must call this."""
    return torch.cat([whole(parameter.grad).flatten() for parameter in parameters])


class Rank:
    """One rank of a run: its model and its step, under `rank`, `gather` and `world_size`."""

    def __init__(
        self, name: str, ledger: Path, rank: int = 0, gather: Gather | None = None, world_size: int = 1, **more: Any
    ) -> None:
        _, _, clipping, keep = CASES[name]
        self.rank, self.world_size = rank, world_size
        self.model, self.config = model_of(name, sharded=gather is not None), config_of(clipping)
        self.losses = CausalLMLoss(self.model)
        self.parameters = trainable_parameters(self.model)
        noise = more.pop("noise", None) or NoNoise(released_size(self.model, self.config, rank))
        given = {"gather": gather, "rank": rank, "world_size": world_size, "keep_whole_sum": keep, **more}
        self.step = PrivateStep(self.model, self.config, ledger=Ledger(ledger), noise=noise, **given)

    def take(self, draw: np.ndarray, examples: Sequence[Any] = EXAMPLES) -> None:
        """The micro-batches of one draw, and the end of the step."""
        for rows in deal(draw, LENGTHS, token_budget=32, ranks=self.world_size)[self.rank]:
            self.step.backward(self.losses(*(padded([examples[row] for row in rows]) if len(rows) else DUMMY)))
        self.step.finish()


def sums_of(ledgers: Path, *ranks: Any) -> dict[str, Tensor]:
    """{case: the noiseless sums of all draws, [draws, P]}, and the clip norms of adaptive clipping."""
    found = {}
    for name in CASES:
        run = Rank(name, ledgers / f"{name}.jsonl", *ranks)
        sums = []
        with run.step:
            for draw in DRAWS:
                run.take(draw)
                sums.append(gradients(run.parameters) * run.config.divisor)
        found[name] = torch.stack(sums)
        found[f"{name}: clip norm"] = torch.tensor([run.step.clip_norm])
    return found


def sums_in_process(rank: int, gather: Gather, world_size: int, ledgers: Path) -> dict[str, Tensor]:
    return sums_of(ledgers, rank, gather, world_size)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return sums_of(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = run_processes(
        request.param, sums_in_process, request.param, tmp_path_factory.mktemp("ledgers")
    )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_is_that_of_one_process(name: str, ranks: list[dict[str, Tensor]], alone: dict[str, Tensor]) -> None:
    """In float64, so that only an error can make them differ. One process is compared with autograd elsewhere."""
    assert alone[name][0].norm() > 0.1
    for rank in ranks:
        torch.testing.assert_close(rank[name], alone[name], rtol=0, atol=1e-11)
        torch.testing.assert_close(rank[f"{name}: clip norm"], alone[f"{name}: clip norm"], rtol=1e-9, atol=0)


def _failing(rank: int, gather: Gather, ledgers: Path, name: str) -> tuple[list[Tensor], list[str]]:
    """(sums of a draw without and with a failure of rank 1, errors of steps whose sum breaks off on rank 1)."""
    pytest.MonkeyPatch().setattr(sharded_sum, "_SMALL", 200)  # sums of several parts
    run, found, errors = Rank(name, ledgers / "ledger.jsonl", rank, gather, 2), [], []
    sums: Any = run.step._sums

    def add(examples: Sequence[Any] = EXAMPLES[rank::2]) -> None:
        run.step.backward(run.losses(*(padded(examples) if examples else DUMMY)))

    with run.step:
        for fails in (False, True):
            if fails and rank == 1:
                with out_of_memory(sums, "add" if CASES[name][3] else "_made", at=0):
                    errors.append(error_of(add))
                run.step.add_nothing()
            add()
            if fails and rank == 0:
                add([])  # while rank 1 tries again
            run.step.finish()
            found.append(gradients(run.parameters))
    for method, at in [] if CASES[name][3] else [("_made", 3), ("_send", len(sums._parcels) - 1)]:
        run = Rank(name, ledgers / "ledger.jsonl", rank, gather, 2)
        sums = run.step._sums
        with run.step, out_of_memory(sums, method, at=at if rank == 1 else -1):
            errors.append(error_of(add))
            if rank == 1:  # rank 0 has a part, and waits for the rest
                run.step.add_nothing()
                errors.append(error_of(run.step._begun))  # before anything else is added, and at the end
            assert gather(torch.tensor([rank])).tolist() == [0, 1], "the ranks are in step"
    return found, errors


@contextmanager
def out_of_memory(sums: Any, method: str, *, at: int) -> Iterator[None]:
    """Memory runs out before one of the calls of a method, or after it if it sends."""
    real, calls = getattr(sums, method), []

    def call(*args: Any) -> Any:
        calls.append(1)
        result = real(*args) if len(calls) != at + 1 or method == "_send" else None
        if len(calls) == at + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    setattr(sums, method, call)
    yield
    delattr(sums, method)


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except RuntimeError as error:
        return f"{type(error).__name__}, may be tried again: {should_reduce_batch_size(error)}, {error}"
    return "none"


@pytest.mark.parametrize("name", ["Llama, tied", "GPT-2, kept whole"])
def test_a_rank_that_ran_out_of_memory_is_tried_again_or_the_step_is_lost(name: str, tmp_path: Path) -> None:
    """It may be tried again until the first part of its sum is sent. In both cases the other rank does not wait."""
    ranks = run_processes(2, _failing, tmp_path, name)
    for (wanted, found), _ in ranks:
        assert wanted.norm() > 0
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    (_, one), (_, other) = ranks
    assert one == ([] if CASES[name][3] else ["none", "none"])  # a whole sum is sent at the end
    assert other[0].startswith("OutOfMemoryError, may be tried again: True")
    for first, second in zip(other[1::2], other[2::2], strict=True):
        assert first.startswith("HalfAdded, may be tried again: False, a sharded sum failed in part")
        assert "half done" in second


def _neighbours(rank: int, gather: Gather, ledgers: Path) -> tuple[float, float]:
    """By how much the sum changes without example 3, and its greatest change allowed."""
    sums = []
    run = Rank("GPT-2", ledgers / "ledger.jsonl", rank, gather, 2)
    with run.step:
        for draw in (np.arange(COUNT), np.delete(np.arange(COUNT), 3)):
            run.take(draw)
            sums.append(gradients(run.parameters) * run.config.divisor)
    return float((sums[0] - sums[1]).norm()), run.config.clip_norm


def test_one_example_moves_the_sum_of_all_ranks_by_at_most_c(tmp_path: Path) -> None:
    for moved, bound in run_processes(2, _neighbours, tmp_path):
        assert 0.9 * bound < moved <= bound * (1 + 1e-9)


STEPS = 6


def _noises(rank: int, gather: Gather, world_size: int, name: str, ledgers: Path) -> dict[str, Any]:
    """What empty draws release: noise alone, in units of its standard deviation."""
    model, config = model_of(name, sharded=True), config_of(CASES[name][2])
    noise = GaussianNoise(released_size(model, config, rank))
    run = Rank(name, ledgers / "ledger.jsonl", rank, gather, world_size, noise=noise)
    own, together, clip_norms = [], [], []
    with run.step:
        for _ in range(STEPS):
            std = run.config.noise_std_per_rank(1, run.step.clip_norm) / run.config.divisor
            run.step.finish()
            own.append(torch.cat([local_part(p.grad).flatten() for p in run.parameters]).double() / std)
            together.append(gradients(run.parameters).double() / std)
            clip_norms.append(run.step.clip_norm)
    return {
        "own": torch.stack(own),
        "together": torch.stack(together),
        "clip norms": clip_norms,
        "adapts": isinstance(config.clipping, Adaptive),
    }


@pytest.fixture(scope="module", params=[(2, "GPT-2"), (4, "Llama, tied"), (3, "adaptive")], ids=str)
def noises(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    world_size, name = request.param
    found: list[dict[str, Any]] = run_processes(world_size, _noises, world_size, name, tmp_path_factory.mktemp("l"))
    return found


def test_each_ranks_shards_have_the_whole_noise_once(noises: list[dict[str, Any]]) -> None:
    for rank in noises:
        values = rank["own"]
        low, high = stats.chi2.ppf([1e-9, 1 - 1e-9], values.numel())
        assert low < values.square().sum() < high
    sizes = [rank["own"].shape[1] for rank in noises]
    assert sum(sizes) == noises[0]["together"].shape[1], "every value is on one rank"
    assert all(torch.equal(rank["together"], noises[0]["together"]) for rank in noises)


def test_noise_is_independent_between_shards_and_steps(noises: list[dict[str, Any]]) -> None:
    size = min(rank["own"].shape[1] for rank in noises)
    vectors = torch.cat([rank["own"][:, :size] for rank in noises])
    correlations = torch.corrcoef(vectors) - torch.eye(len(vectors))
    assert correlations.abs().max() < 6 / size**0.5


def test_adaptive_clipping_moves_with_one_noisy_count_on_all_ranks(noises: list[dict[str, Any]]) -> None:
    norms = [rank["clip norms"] for rank in noises]
    assert all(own == norms[0] for own in norms)
    assert (len(set(norms[0])) > 1) is noises[0]["adapts"]


class Full(Ledger):
    """A ledger whose disk is full."""

    def record(self, **_: Any) -> None:
        raise InvalidArgument("ledger", "there", "is on a full disk")


class Slow(Ledger):
    """A ledger that takes a second, and tells when a line was written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.written = 0.0

    def record(self, **settings: Any) -> None:
        time.sleep(1.0)
        super().record(**settings)
        self.written = time.monotonic()


def _with_full_disk(rank: int, gather: Gather, folder: Path) -> tuple[list[str], bool]:
    """(the errors of a step whose ledger cannot be written, and of its second end; whether there is a gradient)."""
    run = Rank("GPT-2", folder / "ledger.jsonl", rank, gather, 2)
    if rank == 0:
        run.step._ledger = Full(folder / "ledger.jsonl")
    errors = []
    with run.step:
        for end in (lambda: run.take(np.arange(COUNT)), run.step.finish):
            try:
                end()
            except (InvalidArgument, RuntimeError) as error:
                errors.append(str(error))
            if not gather(torch.tensor([len(errors)])).all():
                break  # in a second end, a rank might wait for the one that did not fail
    return errors, any(parameter.grad is not None for parameter in run.parameters)


def test_no_rank_has_a_gradient_that_the_ledger_lacks(tmp_path: Path) -> None:
    reasons = ("full disk", "rank 0 did not write this step into the ledger")
    for reason, (errors, has_gradients) in zip(reasons, run_processes(2, _with_full_disk, tmp_path), strict=True):
        first, second = errors
        assert reason in first
        assert "half done" in second, "its noise cannot be used again"
        assert not has_gradients


def _times(rank: int, gather: Gather, folder: Path) -> tuple[float, float]:
    """(when the first step's line was written, when this rank had the gradient)."""
    ledger = Slow(folder / "ledger.jsonl")
    run = Rank("GPT-2", folder / "ledger.jsonl", rank, gather, 2)
    if rank == 0:
        run.step._ledger = ledger
    with run.step:
        run.take(np.arange(COUNT))
        return ledger.written, time.monotonic()


def test_every_rank_waits_until_the_ledgers_line_is_written(tmp_path: Path) -> None:
    (written, _), (_, ready) = run_processes(2, _times, tmp_path)
    assert 0 < written <= ready


OPTIMIZERS = ("adamw", "sgd", "dp-adam", "lowpass-adam")


def _optimizer(kind: str, parameters: list[nn.Parameter], noise_std: Callable[[], float]) -> torch.optim.Optimizer:
    if kind == "lowpass-adam":
        return LowPassAdam(parameters, lr=0.01, weight_decay=0.1)
    if kind == "dp-adam":
        return DPAdam(parameters, noise_std, lr=0.01, weight_decay=0.1)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=0.01)


def trained(folder: Path, *ranks: Any) -> dict[str, Tensor]:
    """{optimizer: the trained weights after every draw}; the model is also evaluated between two steps."""
    found = {}
    for kind in OPTIMIZERS:
        run = Rank("Llama, tied", folder / f"{kind}.jsonl", *ranks)
        optimizer = _optimizer(kind, run.parameters, run.step.gradient_noise_std)
        with run.step:
            for draw in DRAWS:
                run.take(draw)
                optimizer.step()
                with torch.no_grad():
                    found[f"{kind}: loss"] = run.losses(*padded(EXAMPLES)).double()
        reshard(run.model)
        found[kind] = torch.cat([whole(parameter).flatten() for parameter in run.model.parameters()])
    return found


def _trained_in_process(rank: int, gather: Gather, folder: Path) -> dict[str, Tensor]:
    return trained(folder, rank, gather, 2)


def test_training_ends_with_the_weights_of_one_process(tmp_path: Path) -> None:
    """Weights that were gathered before an update are not used after it."""
    (tmp_path / "alone").mkdir()
    wanted = trained(tmp_path / "alone")
    for rank in run_processes(2, _trained_in_process, tmp_path):
        for kind, values in wanted.items():
            torch.testing.assert_close(rank[kind], values, rtol=1e-7, atol=1e-9, msg=kind)


def plain_gradients(gather: Gather | None, rank: int, world_size: int) -> Tensor:
    model = model_of("Llama, tied", sharded=gather is not None)
    losses, parameters = CausalLMLoss(model), trainable_parameters(model)
    with PlainStep(model, COUNT / 2, gather=gather, world_size=world_size, loss_scale=4.0) as step:
        for rows in deal(np.arange(COUNT), LENGTHS, token_budget=32, ranks=world_size)[rank]:
            step.backward(losses(*(padded([EXAMPLES[row] for row in rows]) if len(rows) else DUMMY)))
        step.finish()
        return gradients(parameters)


def _plain_in_process(rank: int, gather: Gather) -> Tensor:
    return plain_gradients(gather, rank, 2)


def test_a_step_without_privacy_has_the_gradient_of_one_process() -> None:
    wanted = plain_gradients(None, 0, 1)
    for found in run_processes(2, _plain_in_process):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def _mixed(rank: int, gather: Gather, ledger: Path) -> str:
    """A model of which one trained parameter is not sharded."""
    model = model_of("per layer", sharded=True)
    model.lm_head.weight = nn.Parameter(torch.zeros(400, 16, dtype=torch.float64))
    try:
        PrivateStep(model, config_of(Flat()), ledger=Ledger(ledger), gather=gather, rank=rank, world_size=2)
    except InvalidArgument as error:
        return str(error)
    return ""


def test_a_trained_parameter_that_is_not_sharded_is_refused_beside_sharded_ones(tmp_path: Path) -> None:
    for message in run_processes(2, _mixed, tmp_path / "ledger.jsonl"):
        assert message.startswith("lm_head.weight=Parameter: must be sharded by rows")
