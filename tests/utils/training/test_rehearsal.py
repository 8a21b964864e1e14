"""The largest micro-batches run once before training: all ranks settle on a budget that fits. Nothing else changes."""

from __future__ import annotations

import json
import random
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import train_clm
from dptune import CausalLMLoss, InvalidArgument, add_lora
from dptune.lora import trainable_parameters
from dptune.run.plan import RunPlan
from dptune.shapes import Shapes
from dptune.sharded_sum import ShardedSum
from dptune.sharding import local_part
from dptune.step import PrivateStep
from tests.private_sum import config_for
from tests.processes import run_processes
from tests.scripts.test_train_clm import flags, train_file
from tests.tiny import save_tiny, tiny_llama
from tests.utils.training.test_in_step import ALL, CLIP_NORM, COUNT, How, Rank
from tests.utils.training.test_micro_batches import ERRORS, Memory, adapted
from utils.cli.launch import make_accelerator
from utils.training.causal_lm import run as causal_lm_run
from utils.training.in_step import Gathers
from utils.training.rehearsal import PassSize, Rehearsal, is_worthwhile, largest_sizes

__all__ = ["train_file"]  # a fixture
CPU = torch.device("cpu")
BLOCK = 32
SHAPES = Shapes(BLOCK, 8 * BLOCK, drawn=1e6, masked=False)
CONFIG = config_for(COUNT, clip_norm=CLIP_NORM)


def a_plan(*, private: bool = True) -> RunPlan:
    return RunPlan(CONFIG if private else None, CONFIG.num_examples, CONFIG.expected_batch_size, CONFIG.steps)


def a_rehearsal(model: nn.Module, *, private: bool = True, **how: Any) -> Rehearsal:
    return Rehearsal(model, CausalLMLoss(model), a_plan(private=private), make_accelerator(), **how)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("rows_per_item", [1, 3, 4])
@pytest.mark.parametrize("drawn", [1.0, 40.0, 1e6])
@pytest.mark.parametrize(("longest", "budget"), [(32, 256), (512, 2048), (100, 90), (7, 7)])
def test_no_size_has_more_of_anything_that_takes_memory(
    longest: int, budget: int, drawn: float, rows_per_item: int, views: int
) -> None:
    shapes = Shapes(longest, budget, drawn, masked=False, views=views)
    largest = largest_sizes(shapes, rows_per_item)
    every = shapes.sizes(rows_per_item)
    assert {(size.rows, size.tokens) for size in largest} <= every
    assert max(size.rows for size in largest) == max(rows for rows, _ in every)
    assert max(size.tokens for size in largest) == largest[0].tokens == max(tokens for _, tokens in every)
    scores = max(tokens * tokens // rows for rows, tokens in every)
    assert max(size.tokens * size.width for size in largest) == scores
    assert all(size.items == 1 or size.tokens <= budget for size in largest)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("limit", [8 * BLOCK, 8 * BLOCK - 1, 3 * BLOCK, BLOCK])
def test_the_budget_is_halved_until_the_largest_micro_batch_fits(
    limit: int, private: bool, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted()
    memory = Memory(model, limit, where, ERRORS["cpu"])
    settled = a_rehearsal(model, private=private).settle(SHAPES)
    sizes = largest_sizes(settled)
    assert max(size.tokens for size in sizes) <= limit
    if limit == 8 * BLOCK:
        assert settled == SHAPES
        assert not memory.failed
    else:
        assert 2 * max(size.tokens for size in sizes) > limit, "no smaller than it must be"
    assert memory.attempts[-len(sizes) :] == [size.tokens for size in sizes]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith(f"tokens at a time       {sizes[0].tokens:,} ({sizes[0].rows} x {sizes[0].width}) fit")
    assert ("more did not" in printed) is (settled != SHAPES)


def test_a_single_example_that_does_not_fit_is_refused() -> None:
    model = adapted()
    Memory(model, BLOCK - 1)
    with pytest.raises(InvalidArgument, match=rf"block_size: .*single example of {BLOCK} tokens"):
        a_rehearsal(model).settle(SHAPES)


def test_one_authors_rows_that_do_not_fit_are_refused() -> None:
    model = adapted()
    Memory(model, 4 * BLOCK - 1)
    with pytest.raises(InvalidArgument, match=rf"examples_per_unit: .*one author's 4 rows of {BLOCK} tokens"):
        a_rehearsal(model, rows_per_item=4).settle(SHAPES)


def test_views_of_an_example_that_do_not_fit_are_refused() -> None:
    model = adapted()
    Memory(model, 4 * BLOCK - 1)
    with pytest.raises(InvalidArgument, match=rf"block_size: .*example of {BLOCK} tokens in 4 views; lower --views"):
        a_rehearsal(model).settle(replace(SHAPES, views=4))


def test_an_authors_rows_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(), []
    backward = Rehearsal._fits_here
    monkeypatch.setattr(Rehearsal, "_fits_here", lambda *args: seen.append(args[-1]) or backward(*args))
    a_rehearsal(model, rows_per_item=4).settle(SHAPES)
    assert PassSize(2, 4, BLOCK) in seen


def test_another_error_passes_through() -> None:
    model = adapted()
    Memory(model, 0, "forward", RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        a_rehearsal(model).settle(SHAPES)


def _state(model: nn.Module) -> dict[str, Any]:
    """What a rehearsal must leave as it is."""
    return {
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "training": [module.training for module in model.modules()],
        "values": [value.tolist() for value in model.state_dict().values()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("limit", [8 * BLOCK, 3 * BLOCK, BLOCK - 1])
def test_nothing_is_left_of_it(limit: int, private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    add_lora(model, rank=4, dropout=0.5)
    Memory(model, limit)
    before = _state(model)
    if limit < BLOCK:
        with pytest.raises(InvalidArgument):
            a_rehearsal(model, private=private).settle(SHAPES)
    else:
        a_rehearsal(model, private=private).settle(SHAPES)
    assert _state(model) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("keeps_average", "copies"), [(False, 2), (True, 3)])
def test_the_average_is_held_beside_the_moments(keeps_average: bool, copies: int) -> None:
    model = adapted()
    trained = sum(parameter.numel() for parameter in trainable_parameters(model))
    with a_rehearsal(model, keeps_average=keeps_average)._held_meanwhile() as held:
        assert sum(tensor.numel() for tensor in held) == copies * trained


def test_its_step_can_release_nothing() -> None:
    model = adapted()
    rehearsal = a_rehearsal(model)
    with rehearsal._step() as step:
        step.backward(rehearsal.losses(input_ids=(ids := rehearsal._tokens(PassSize(2, 1, 8))), labels=ids))
        with pytest.raises(RuntimeError, match="a rehearsal releases nothing"):
            step.finish()


def test_it_is_worthwhile_with_shards_and_on_accelerators() -> None:
    gathers = Gathers(adapted(), private=True)
    assert [is_worthwhile(device, None) for device in (CPU, torch.device("cuda"))] == [False, True]
    assert is_worthwhile(CPU, gathers)
    gathers.is_steady = False
    assert not is_worthwhile(torch.device("cuda"), gathers)


def test_a_run_with_it_is_the_same_to_the_bit(
    tiny_model_dir: Path,
    train_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:
    del no_plots
    found: dict[bool, Any] = {}
    for rehearses in (False, True):
        out = tmp_path / str(rehearses)
        monkeypatch.setattr(causal_lm_run, "is_worthwhile", lambda *_, rehearses=rehearses: rehearses)
        changes = {"max_train_steps": 3, "num_train_epochs": None, "insecure_test_seed": 1, "lora_dropout": 0.1}
        train_clm.main(flags(tiny_model_dir, train_file, out, **changes))
        assert ("fit in memory" in capsys.readouterr().out) is rehearses
        weights = torch.load(out / "publish" / "lora_weights.bin")
        found[rehearses] = {name: value.tolist() for name, value in weights.items()} | {
            "ledger": (out / "ledger.jsonl").read_text(),
            "epsilon": json.loads((out / "publish" / "privacy_report.json").read_text())["epsilon"],
        }
    assert found[True] == found[False]


LIMIT = 3 * BLOCK


class SumMemory:
    """Runs out above a limit of tokens while the last of a micro-batch's sums is made."""

    def __init__(self, patch: pytest.MonkeyPatch, tokens: float) -> None:
        self.tokens, self.failed, made = tokens, [], ShardedSum._made

        def make(this: ShardedSum, parcel: Any, recorded: Any, weights: Any) -> Any:
            tokens = BLOCK * len(next(iter(weights.values())))
            if "lm_head.weight" in parcel.names and tokens > self.tokens:
                self.failed.append(tokens)
                raise ERRORS["cuda"]
            return made(this, parcel, recorded, weights)

        patch.setattr(ShardedSum, "_made", make)


CASES = {
    "forward": ("forward", How()),
    "backward": ("backward", How()),
    "whole": ("backward", How(whole=True)),
    "whole, sum kept": ("backward", How(whole=True, keep=True)),
    "whole, in the sum": ("sum", How(whole=True)),
    "not sharded": ("backward", How(sharded=False)),
}


def _two_ranks(rank: int, gather: Any, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: _settled_on(rank, gather, folder, *CASES[name]) for name in names}


def _seen_in_passes(patch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Of each backward pass: (whether there is room for the step's sum, values of the moments that are in memory)."""
    seen, moments = [], []
    backward, empty_like = PrivateStep.backward, torch.empty_like

    def noted_backward(step: PrivateStep, *args: Any, **how: Any) -> Any:
        alive = [one for one in (ref() for ref in moments) if one is not None]
        seen.append((step._has_begun, sum(local_part(one).numel() for one in alive)))
        return backward(step, *args, **how)

    def noted_empty_like(value: Any, **how: Any) -> Any:
        made = empty_like(value, **how)
        if isinstance(value, nn.Parameter):
            moments.append(weakref.ref(made))
        return made

    patch.setattr(PrivateStep, "backward", noted_backward)
    patch.setattr(torch, "empty_like", noted_empty_like)
    return seen


def _settled_on(rank: int, gather: Any, folder: Path, where: str, how: How) -> dict[str, Any]:
    """Memory is smaller on rank 1 alone, in the rehearsal and in the step after it."""
    one = Rank(folder, gather, rank, how)
    limit = LIMIT if rank == 1 else float("inf")
    memory: Any = SumMemory(one.patch, limit) if where == "sum" else Memory(one.model, limit, where)
    more: dict[str, Any] = {"gathers": one.gathers, "keep_whole_sum": how.keep}
    rehearsal = Rehearsal(one.model, one.losses, a_plan(), one.accelerator, **more)
    with one.patch.context() as patch:
        held = _seen_in_passes(patch)
        settled = rehearsal.settle(SHAPES)
    if len(set(gather(torch.tensor([settled.token_budget])).tolist())) > 1:
        return {"settled": settled}  # ranks that cut differently would wait for each other
    failed = list(memory.failed)
    total = one.sum_of(ALL, shapes=settled)
    found = {"settled": settled, "failed": failed, "failed later": memory.failed[len(failed) :], "sum": total}
    found |= {"held": set(held), "wanted held": 2 * sum(local_part(p).numel() for p in trainable_parameters(one.model))}
    memory.tokens = float("inf")
    found["wanted"] = one.sum_of(ALL)
    one.patch.undo()
    return found


@pytest.mark.parametrize("names", [[name for name in CASES if name != "not sharded"], ["not sharded"]], ids=len)
def test_all_ranks_settle_on_what_fits_on_the_smallest(names: list[str], tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    ranks = run_processes(2, _two_ranks, tmp_path, names)
    for one, other in ([rank[name] for rank in ranks] for name in names):
        assert one["settled"] == other["settled"]
        assert other["failed"]
        assert not one["failed"]
        assert one["settled"].token_budget <= LIMIT
        for rank in (one, other):
            assert not rank["failed later"]
            assert rank["held"] == {(True, rank["wanted held"])}, "the sum, and the moments as shards"
            assert torch.equal(rank["sum"], one["sum"])
            assert (rank["sum"] - one["wanted"]).norm() < 1e-6 * one["wanted"].norm()


def _too_small(rank: int, gather: Any, folder: Path) -> str:
    """One row does not fit on rank 1; both ranks must say so."""
    one = Rank(folder, gather, rank, How())
    Memory(one.model, BLOCK - 1 if rank == 1 else float("inf"))
    with pytest.raises(InvalidArgument) as error:
        Rehearsal(one.model, one.losses, a_plan(), make_accelerator(), gathers=one.gathers).settle(SHAPES)
    return str(error.value)


def test_all_ranks_refuse_a_row_that_does_not_fit_on_one(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    one, other = run_processes(2, _too_small, tmp_path)
    assert one == other
    assert f"single example of {BLOCK} tokens" in one
