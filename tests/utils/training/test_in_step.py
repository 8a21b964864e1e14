"""Memory runs out on a rank with sharded weights, at every place of a pass: nothing hangs, nothing counts twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dptune import CausalLMLoss, InvalidArgument, Keystream, Ledger, PlainStep, PoissonSampler, PrivateStep, add_lora
from dptune.shapes import Shape, Shapes
from dptune.units.batches import AuthorDraw, UnitDraw
from tests.examples import randomise_adapters
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.tiny import save_tiny, tiny_llama
from tests.utils.training.test_micro_batches import COUNT, DATA, LONGEST
from utils.cli.interruption import StopRequest
from utils.cli.launch import Sharding, make_accelerator
from utils.models.loading import checkpoint_activations, load_model
from utils.training.in_step import Gathers, _Noted, unless_out_of_memory
from utils.training.micro_batches import MicroBatches, remembered_budget

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
        inside = [*model.model.layers, *(part for layer in model.model.layers for part in (layer.self_attn, layer.mlp))]
        for number, module in enumerate([model.model.embed_tokens, *inside, model.model.norm]):
            self._watch(module, f"{type(module).__name__} {number}")

    def __call__(self, place: str) -> None:
        self.places.append(place)
        if len(self.places) - 1 in self.failing:
            self.failed.append(place)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def start(self, *failing: int) -> None:
        """Forget the places so far; the next ones are numbered from 0."""
        self.places, self.failed, self.failing = [], [], set(failing)

    def gathers_can_fail(self, patch: pytest.MonkeyPatch) -> None:
        """Except while the rank catches up: then the failed pass has freed what it held."""
        real, catch_up, catching_up = _Noted.allocate, Gathers.catch_up, []

        def allocate(this: Any, size: Any, **how: Any) -> Tensor:
            if not catching_up:
                self("gather")
            return real(this, size, **how)

        def with_room(this: Gathers) -> None:
            catching_up.append(True)
            catch_up(this)
            catching_up.clear()

        patch.setattr(_Noted, "allocate", allocate)
        patch.setattr(Gathers, "catch_up", with_room)

    def _watch(self, module: nn.Module, name: str) -> None:
        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            self(f"{name} forward")
            first, *rest = output if isinstance(output, tuple) else (output,)
            first = _Event.apply(first, self, f"{name} backward")
            return (first, *rest) if isinstance(output, tuple) else first

        module.register_forward_pre_hook(lambda *_: self(f"{name} begins"))
        module.register_forward_hook(after)


def adapted(folder: Path, *, sharded: bool = True, kept: bool = False, checkpointing: bool = False) -> Any:
    sharding = Sharding(reshard_after_forward=not kept) if sharded else None
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), sharding=sharding)
    add_lora(model, rank=4, alpha=8.0)
    randomise_adapters(model)
    if checkpointing:
        checkpoint_activations(model.train())
    return model


class Rank:
    """One of several ranks with sharded weights, which runs draws."""

    def __init__(self, folder: Path, gather: Any, rank: int, *, private: bool = True, **how: bool) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # of the group that is there already
        self.model = adapted(folder / "model", **how)
        self.memory = Memory(self.model)
        self.memory.gathers_can_fail(pytest.MonkeyPatch())
        self.gathers = Gathers(self.model) if how.get("sharded", True) else None
        self.losses, self.rank, self.private = CausalLMLoss(self.model), rank, private
        self.folder, self.gather = folder, gather
        self.ranks: dict[str, Any] = {"gather": gather, "world_size": 2}

    def sum_of(
        self, draw: UnitDraw, *failing: int, sampler: PoissonSampler | None = None, shapes: Shapes = SHAPES
    ) -> Tensor:
        """The clipped sum of a draw, while memory runs out at some places on this rank."""
        config = config_for(COUNT, clip_norm=CLIP_NORM)
        self.batches = MicroBatches(
            DATA,
            shapes,
            0,
            make_accelerator(),
            in_step=self.gathers is not None,
            gathers=self.gathers,
            folder=self.folder,
        )
        size = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        ledger = Ledger(self.folder / "ledger.jsonl")
        step: Any = (
            PrivateStep(
                self.model,
                config,
                ledger=ledger,
                noise=NoNoise(size),  # type: ignore[arg-type]
                rank=self.rank,
                sampler=sampler,
                **self.ranks,
            )
            if self.private
            else PlainStep(self.model, config.expected_batch_size, **self.ranks)
        )
        with step:
            self.memory.start(*failing)
            seen = self.batches.run(draw, step, self.losses, StopRequest())
            self.places, self.failed = self.memory.places, self.memory.failed
            self.items = sum(len(stats.losses) for stats in seen or [])
            self.memory.start()
            step.finish()
            return torch.cat([p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None])


ALL = np.arange(COUNT)
SETTINGS = {
    "sharded": {},
    "recomputing": {"checkpointing": True},
    "kept after forward": {"kept": True},
    "without privacy": {"private": False},
    "not sharded": {"sharded": False},
}


def _every_place(rank: int, gather: Any, folder: Path, how: dict[str, bool], step: int) -> dict[str, Any]:
    """The sum of a draw, undisturbed and with a failure at every `step`-th place of rank 1's first micro-batch."""
    one = Rank(folder, gather, rank, **how)
    wanted = one.sum_of(ALL)  # from now on the gathers of a pass are known
    again = one.places.index("Embedding 0 begins", one.places.index("Embedding 0 begins") + 1)
    found: dict[str, Any] = {"wanted": wanted, "places": one.places[:again:step], "sums": [], "failed": [], "items": []}
    for place in range(0, again, step):
        found["sums"].append(one.sum_of(ALL, *([place] if rank == 1 else [])))
        found["failed"].append(one.failed)
        found["items"].append(one.items)
    # Of one row, rank 1 has a dummy alone.
    found["of one"] = [one.sum_of(np.array([7]), *([number] if rank == 1 else [])) for number in (999, 2, 9)]
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_memory_may_run_out_at_every_place_of_one_rank(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    every = 1 if name == "sharded" else 4  # the other settings take the same code, with some places as a sample
    one, other = run_processes(2, _every_place, tmp_path, SETTINGS[name], every)
    wanted = one["wanted"]
    assert wanted.norm() > 0
    assert ("gather" in other["places"]) is (name != "not sharded")
    for number, place in enumerate(other["places"]):
        assert (one["failed"][number], other["failed"][number]) == ([], [place])
        assert one["items"][number] + other["items"][number] == COUNT
        assert torch.equal(one["sums"][number], other["sums"][number])
        assert (one["sums"][number] - wanted).norm() < 1e-6 * wanted.norm(), place
    for rank in (one, other):
        assert rank["of one"][0].norm() > 0
        assert all(torch.equal(total, one["of one"][0]) for total in rank["of one"])


WIDE = Shapes(LONGEST, 32 * LONGEST, drawn=1e6)  # which may be halved several times


def _random_places(rank: int, gather: Any, folder: Path) -> list[dict[str, Any]]:
    """Draws of a sampler, rows and authors, in which memory runs out at random places of both ranks, several times."""
    one, random = Rank(folder, gather, rank), np.random.default_rng(rank)
    found = []
    sampler = PoissonSampler(COUNT, 0.5, Keystream.for_tests("draws"))
    one.sum_of(ALL)
    for number in range(5):
        draw: UnitDraw = sampler.draw()
        if number % 2:
            draw = AuthorDraw([np.array([row]) for row in draw], mean=False, most=2, numbers=draw)
        failing = random.choice(150, size=3, replace=False).tolist()
        total = one.sum_of(draw, *failing, sampler=sampler, shapes=WIDE)
        found.append({"sum": total, "draw": draw, "failed": one.failed, "budget": one.batches.shapes.token_budget})
        found[-1]["wanted"] = one.sum_of(draw)
        found[-1]["steady"] = one.gathers is not None and one.gathers.can_catch_up
    return found


def test_several_failures_on_both_ranks_count_each_item_of_the_draw_once(tmp_path: Path) -> None:
    """The sampler compares what each step was fed with its draw."""
    save_tiny(tmp_path / "model")
    ranks = run_processes(2, _random_places, tmp_path)
    assert all(sum(len(step["failed"]) for step in rank) > 5 for rank in ranks)
    assert max(len(step["failed"]) for rank in ranks for step in rank) > 1
    for one, other in zip(*ranks, strict=True):
        assert torch.equal(one["sum"], other["sum"])
        assert (one["sum"] - one["wanted"]).norm() < 1e-6 * one["wanted"].norm()
        assert one["budget"] == other["budget"]
        assert (one["budget"] < WIDE.token_budget) is bool(one["failed"] or other["failed"])
        assert one["steady"]
        assert other["steady"]
    least = min(step["budget"] for step in ranks[0])
    assert remembered_budget(tmp_path, WIDE.token_budget) == least


def _alone(_rank: int, _gather: Any, folder: Path) -> dict[str, Any]:
    """What a rank knows about its gathers, by what it went through."""
    model = adapted(folder)
    gathers, losses, device = Gathers(model), CausalLMLoss(model), torch.device("cpu")
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
    gathers = Gathers(model)
    unless_out_of_memory(run, device, gathers)
    unless_out_of_memory(lambda: run(1), device, gathers)
    found["after a pass with other layers"] = gathers.can_catch_up
    whole = fully_shard(nn.Linear(4, 4))
    trained = Gathers(whole)
    unless_out_of_memory(lambda: whole(torch.ones(1, 4)).sum(), device, trained)
    found["with trained shards"] = trained.can_catch_up
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
            "with trained shards": False,
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
