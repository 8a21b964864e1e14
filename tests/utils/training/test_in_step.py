"""Memory runs out on a rank with sharded weights, at every place of a pass: nothing hangs, nothing counts twice."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dptune import (
    CausalLMLoss,
    InvalidArgument,
    Keystream,
    Ledger,
    PlainStep,
    PoissonSampler,
    PrivateStep,
    add_lora,
    sharded_sum,
)
from dptune.clipping import Clipper
from dptune.flat import released_size
from dptune.per_example import Recorded
from dptune.shapes import Shape, Shapes
from dptune.sharded_sum import ShardedSum
from dptune.sharding import local_part
from dptune.step_sums import WholeSum
from dptune.units.batches import AuthorDraw, UnitDraw
from tests.examples import randomise_adapters
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.tiny import save_tiny, tiny_llama
from tests.utils.training.test_micro_batches import COUNT, DATA, LONGEST
from utils.cli.interruption import StopRequest
from utils.cli.launch import Sharding, make_accelerator
from utils.models.loading import checkpoint_activations, load_model
from utils.models.trainable import choose_trainable
from utils.training import micro_batches
from utils.training.in_step import Gathers, _Noted, unless_out_of_memory
from utils.training.micro_batches import MicroBatches, remembered_budget
from utils.training.shared_stop import SharedStop

BUDGET, CLIP_NORM = 96, 0.05
SHAPES = Shapes(LONGEST, BUDGET, drawn=1e6)


class _Event(torch.autograd.Function):
    """An identity whose backward pass is a place where memory may run out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, happens: Callable[[str], None], name: str) -> Tensor:
        ctx.happens, ctx.name = happens, name
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.happens(ctx.name)
        return grads[0], None, None


class Memory:
    """Counts the places where memory may run out, and raises at those that are chosen."""

    def __init__(self, model: Any) -> None:
        self.places: list[str] = []
        self.failing: set[int] = set()
        self.failed: list[str] = []
        self.has_room = False
        inside = [*model.model.layers, *(part for layer in model.model.layers for part in (layer.self_attn, layer.mlp))]
        for number, module in enumerate([model.model.embed_tokens, *inside, model.model.norm]):
            self._watch(module, f"{type(module).__name__} {number}")

    def __call__(self, place: str) -> None:
        if self.has_room:
            return
        self.places.append(place)
        if len(self.places) - 1 in self.failing:
            self.failed.append(place)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def start(self, *failing: int) -> None:
        """Forget the places so far; the next ones are numbered from 0."""
        self.places, self.failed, self.failing = [], [], set(failing)

    def watch_the_rest(self, patch: pytest.MonkeyPatch) -> None:
        """Gathers, and what a step does after its passes until the first sum is sent.

        Not while the rank makes up for a failed pass: that pass has freed what it held.
        """
        self._before(patch, _Noted, "allocate", "gather")
        self._before(patch, Recorded, "squared_norms", "norms")
        self._before(patch, Clipper, "factors", "clip factors")
        for owner in (WholeSum, ShardedSum):
            self._before(patch, owner, "begin", "the step's sum")
            self._before(patch, owner, "add", "a micro-batch's sum")
        self._before(patch, ShardedSum, "_made", "a parameter's sum", when=lambda sums: sums._sent == 0)
        self._with_room(patch, Gathers, "catch_up")
        self._with_room(patch, PrivateStep, "add_nothing")

    def _before(
        self, patch: pytest.MonkeyPatch, owner: type, name: str, place: str, when: Callable[[Any], bool] = bool
    ) -> None:
        method = getattr(owner, name)

        def run(this: Any, *args: Any, **how: Any) -> Any:
            if when(this):
                self(place)
            return method(this, *args, **how)

        patch.setattr(owner, name, run)

    def _with_room(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        method = getattr(owner, name)

        def run(this: Any) -> None:
            self.has_room = True
            method(this)
            self.has_room = False

        patch.setattr(owner, name, run)

    def _watch(self, module: nn.Module, name: str) -> None:
        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            self(f"{name} forward")
            first, *rest = output if isinstance(output, tuple) else (output,)
            first = _Event.apply(first, self, f"{name} backward")
            return (first, *rest) if isinstance(output, tuple) else first

        module.register_forward_pre_hook(lambda *_: self(f"{name} begins"))
        module.register_forward_hook(after)


@dataclass(frozen=True)
class How:
    """What is trained, and how.

    Attributes:
        whole: train every parameter instead of adapters.
        sharded: shard the model's own weights.
        reshard: drop gathered weights after the forward pass.
        recompute: recompute activations.
        private: with privacy.
        keep: see `PrivateStep`'s `keep_whole_sum`.
        every: memory runs out at every so many places. The other settings share most of the code.
    """

    whole: bool = False
    sharded: bool = True
    reshard: bool = True
    recompute: bool = False
    private: bool = True
    keep: bool = False
    every: int = 6


def model_of(folder: Path, how: How) -> Any:
    sharding = Sharding(reshard_after_forward=how.reshard) if how.sharded else None
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), sharding=sharding)
    if how.whole:
        choose_trainable(model, ["all"])
    else:
        add_lora(model, rank=4, alpha=8.0)
        randomise_adapters(model)
    if how.recompute:
        checkpoint_activations(model.train())
    return model


class Rank:
    """One of several ranks, which runs draws."""

    def __init__(self, folder: Path, gather: Any, rank: int, how: How) -> None:
        gc.freeze()  # each failure collects garbage, and need not look at everything that was imported
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # of the group that is there already
        self.model, self.how, self.rank, self.folder = model_of(folder / "model", how), how, rank, folder
        self.memory, self.patch = Memory(self.model), pytest.MonkeyPatch()
        self.memory.watch_the_rest(self.patch)
        self.gathers = Gathers(self.model, private=how.private) if how.sharded else None
        self.patch.setattr(sharded_sum, "_SMALL", 1000)  # sums of several parts
        self.patch.setattr(micro_batches, "SharedStop", cache(SharedStop))  # one group for all draws
        self.losses, self.accelerator = CausalLMLoss(self.model), make_accelerator()
        self.ranks: dict[str, Any] = {"gather": gather, "world_size": 2}
        self.ledger = Ledger(folder / "ledger.jsonl")

    def sum_of(
        self, draw: UnitDraw, *failing: int, sampler: PoissonSampler | None = None, shapes: Shapes = SHAPES
    ) -> Tensor:
        """The clipped sum of a draw over all ranks, while memory runs out at some places on this rank.

        That of trained shards is in the order of the ranks.
        """
        self.batches = MicroBatches(
            DATA,
            shapes,
            0,
            self.accelerator,
            in_step=self.gathers is not None,
            gathers=self.gathers,
            folder=self.folder,
        )
        with self._step(sampler) as step:
            self.memory.start(*failing)
            seen = self.batches.run(draw, step, self.losses, StopRequest())
            self.places, self.failed = self.memory.places, self.memory.failed
            self.items = sum(len(stats.losses) for stats in seen or [])
            self.memory.start()
            step.finish()
            found = [local_part(p.grad).flatten().double() for p in self.model.parameters() if p.grad is not None]
            return torch.cat(gather_object(found) if self.how.whole else found)

    def _step(self, sampler: PoissonSampler | None) -> Any:
        config = config_for(COUNT, clip_norm=CLIP_NORM)
        if not self.how.private:
            return PlainStep(self.model, config.expected_batch_size, **self.ranks)
        return PrivateStep(
            self.model,
            config,
            ledger=self.ledger,
            noise=NoNoise(released_size(self.model, config, self.rank)),  # type: ignore[arg-type]
            rank=self.rank,
            sampler=sampler,
            keep_whole_sum=self.how.keep,
            **self.ranks,
        )


ALL = np.arange(COUNT)
FEW = np.arange(4)  # one micro-batch of two ranks
SETTINGS = {
    "sharded": How(every=3),
    "recomputing": How(recompute=True),
    "kept after forward": How(reshard=False),
    "without privacy": How(private=False),
    "not sharded": How(sharded=False),
    "whole": How(whole=True, every=1),
    "whole, recomputing": How(whole=True, recompute=True),
    "whole, sum kept": How(whole=True, keep=True),
}
OF_ONE = ("sharded", "whole")


def _every_place(rank: int, gather: Any, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """By setting: a draw's sum, undisturbed and with failures at places of rank 1's micro-batch."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        one = Rank(folder, gather, rank, SETTINGS[name])
        wanted = one.sum_of(FEW)  # from now on the gathers of a pass are known
        numbers = range(0, len(one.places), one.how.every)
        own: dict[str, Any] = {"wanted": wanted, "places": [one.places[number] for number in numbers], "found": []}
        for number in numbers:
            total = one.sum_of(FEW, *([number] if rank == 1 else []))
            own["found"].append((total, one.failed, one.items))
        # Of one row, rank 1 has a dummy alone.
        failing = [999, 9, 28] if name in OF_ONE else []
        own["of one"] = [one.sum_of(np.array([7]), *([number] if rank == 1 else [])) for number in failing]
        found[name] = own
        one.patch.undo()
    return found


@pytest.fixture(scope="module")
def at_every_place(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("places")
    save_tiny(folder / "model")
    return run_processes(2, _every_place, folder, list(SETTINGS))


@pytest.mark.parametrize("name", SETTINGS)
def test_memory_may_run_out_at_every_place_of_one_rank(
    name: str, at_every_place: list[dict[str, dict[str, Any]]]
) -> None:
    one, other = (rank[name] for rank in at_every_place)
    wanted = one["wanted"]
    assert wanted.norm() > 0
    assert ("gather" in other["places"]) is SETTINGS[name].sharded
    if name == "whole":
        assert {"norms", "clip factors", "the step's sum", "a micro-batch's sum"} < set(other["places"])
    for place, (own, own_failed, own_items), (total, failed, items) in zip(
        other["places"], one["found"], other["found"], strict=True
    ):
        assert (own_failed, failed) == ([], [place])
        assert own_items + items == len(FEW)
        assert torch.equal(own, total)
        assert (total - wanted).norm() < 1e-6 * wanted.norm(), place
    if name in OF_ONE:
        assert one["of one"][0].norm() > 0
    assert all(torch.equal(total, one["of one"][0]) for total in one["of one"] + other["of one"])


WIDE = Shapes(LONGEST, 32 * LONGEST, drawn=1e6)  # which may be halved several times


RANDOM = {"adapters": How(), "whole": How(whole=True), "whole, sum kept": How(whole=True, keep=True)}


def _random_places(rank: int, gather: Any, folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for name, how in RANDOM.items():
        one = Rank(folder / name, gather, rank, how)
        found[name] = _of_random_places(one)
        one.patch.undo()
    return found


def _of_random_places(one: Rank) -> list[dict[str, Any]]:
    """Draws of a sampler, rows and authors, in which memory runs out at random places of both ranks, several times."""
    random, found = np.random.default_rng(one.rank), []
    sampler = PoissonSampler(COUNT, 0.5, Keystream.for_tests("draws"))
    one.sum_of(FEW)
    for number in range(4):
        draw: UnitDraw = sampler.draw()
        if number % 2:
            draw = AuthorDraw([np.array([row]) for row in draw], mean=False, most=2, numbers=draw)
        failing = random.choice(150, size=3, replace=False).tolist()
        total = one.sum_of(draw, *failing, sampler=sampler, shapes=WIDE)
        found.append({"sum": total, "draw": draw, "failed": one.failed, "budget": one.batches.shapes.token_budget})
        found[-1]["wanted"] = one.sum_of(draw)
        found[-1]["steady"] = one.gathers is not None and one.gathers.can_catch_up
    return found


@pytest.fixture(scope="module")
def at_random_places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[dict[str, Any]]]]]:
    folder = tmp_path_factory.mktemp("random")
    for name in RANDOM:
        save_tiny(folder / name / "model")
    return folder, run_processes(2, _random_places, folder)


@pytest.mark.parametrize("name", RANDOM)
def test_several_failures_on_both_ranks_count_each_item_of_the_draw_once(
    name: str, at_random_places: tuple[Path, list[dict[str, list[dict[str, Any]]]]]
) -> None:
    """The sampler compares what each step was fed with its draw."""
    folder, ranks = at_random_places[0] / name, [rank[name] for rank in at_random_places[1]]
    assert all(sum(len(step["failed"]) for step in rank) > 4 for rank in ranks)
    assert max(len(step["failed"]) for rank in ranks for step in rank) > 1
    for one, other in zip(*ranks, strict=True):
        assert torch.equal(one["sum"], other["sum"])
        assert (one["sum"] - one["wanted"]).norm() < 1e-6 * one["wanted"].norm()
        assert one["budget"] == other["budget"]
        assert (one["budget"] < WIDE.token_budget) is bool(one["failed"] or other["failed"])
        assert one["steady"]
        assert other["steady"]
    least = min(step["budget"] for step in ranks[0])
    assert remembered_budget(folder, WIDE.token_budget) == least


def _alone(_rank: int, _gather: Any, folder: Path) -> dict[str, Any]:
    """What a rank knows about its gathers, by what it went through."""
    model = model_of(folder, How())
    gathers, losses, device = Gathers(model, private=False), CausalLMLoss(model), torch.device("cpu")
    ids = torch.arange(3, 9)[None]

    def run(layers: int = 2) -> bool:
        kept, model.model.layers = model.model.layers, model.model.layers[:layers]
        losses(ids, ids).sum().backward()
        model.model.layers = kept
        return True

    model.reshard()  # `CausalLMLoss` has tried its model
    found: dict[str, Any] = {"at first": gathers.can_catch_up}
    found["pass"], found["after a pass"] = unless_out_of_memory(run, device, gathers), gathers.can_catch_up
    with torch.no_grad():
        losses(ids, ids)  # leaves the root group gathered
    unless_out_of_memory(run, device, gathers)
    found["after an evaluation"] = gathers.can_catch_up
    gathers.begin()
    with pytest.raises(RuntimeError, match="Gloo"):
        gathers.note(model, _broken)
    found["after an error inside a gather"] = gathers.can_catch_up
    with pytest.raises(RuntimeError, match="not known which gathers"):
        gathers.catch_up()
    gathers = Gathers(model, private=False)
    unless_out_of_memory(run, device, gathers)
    unless_out_of_memory(lambda: run(1), device, gathers)
    found["after a pass with other layers"] = gathers.can_catch_up
    for private in (False, True):
        whole = fully_shard(nn.Linear(4, 4))
        trained = Gathers(whole, private=private)
        unless_out_of_memory(lambda whole=whole: whole(torch.ones(1, 4)).sum(), device, trained)
        found[f"with trained shards, {private=}"] = trained.can_catch_up
    return found


def _broken() -> Any:
    raise RuntimeError("[Gloo] out of memory. Connection reset by peer")


def test_a_rank_knows_whether_it_can_catch_up(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for rank in run_processes(2, _alone, tmp_path):
        assert rank == {
            "at first": False,
            "pass": True,
            "after a pass": True,
            "after an evaluation": True,
            "after an error inside a gather": False,
            "after a pass with other layers": False,
            "with trained shards, private=False": False,
            "with trained shards, private=True": True,
        }


def test_an_error_of_the_communication_is_not_taken_for_memory() -> None:
    def fail() -> None:
        raise torch.distributed.DistBackendError("NCCL error: unhandled cuda error, out of memory.")

    with pytest.raises(torch.distributed.DistBackendError):
        unless_out_of_memory(fail, torch.device("cpu"))


def test_a_dummy_that_fails_ends_the_launch_where_its_rank_cannot_catch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it."""
    model = tiny_llama()
    add_lora(model, rank=4)
    memory, losses = Memory(model), CausalLMLoss(model)
    batches = MicroBatches(DATA, SHAPES, 0, make_accelerator(), in_step=True, folder=tmp_path)
    monkeypatch.setattr(batches, "_dealt", lambda *_: [(Shape(2, LONGEST), [np.array([], dtype=np.int64)])])
    with PlainStep(model, 5.0) as step:
        memory.start(3)
        with pytest.raises(InvalidArgument, match="cannot cut one micro-batch differently"):
            batches.run(ALL, step, losses, StopRequest())
    assert memory.failed
    assert remembered_budget(tmp_path, BUDGET) == BUDGET // 2
