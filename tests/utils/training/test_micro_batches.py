"""One draw through the model: each example counts once, whatever the memory, and all ranks stop together."""

from __future__ import annotations

import math
import os
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, InvalidArgument, Ledger, PlainStep, PrivateStep, add_lora
from dptune.per_example import HalfAdded
from dptune.sampling import deal
from dptune.shapes import Shapes, deal_in_shapes
from tests.examples import random_examples, randomise_adapters
from tests.private_sum import NoNoise, config_for, private_sum
from tests.processes import run_processes
from tests.tiny import tiny_llama
from utils.cli.interruption import StopRequest
from utils.cli.launch import make_accelerator
from utils.data.tokenization import TokenizedDataset
from utils.training import micro_batches as module
from utils.training.in_step import Gathers
from utils.training.micro_batches import BUDGET_NAME, MicroBatches, remember_budget, remembered_budget

COUNT, BUDGET, CLIP_NORM = 24, 192, 0.05
EXAMPLES = random_examples(COUNT, seed=2)
LONGEST = max(len(ids) for ids, _ in EXAMPLES)
ALL = np.arange(COUNT)
NOBODY = np.array([], dtype=np.int64)
CPU_TEXT = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(CPU_TEXT),
    "python": MemoryError(),
}


def as_data() -> TokenizedDataset:
    ids = [np.array(ids, dtype=np.int32) for ids, _ in EXAMPLES]
    answers = [np.array(labels) != -100 for _, labels in EXAMPLES]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in ids])])
    return TokenizedDataset(np.concatenate(ids), np.concatenate(answers), starts, num_cut=0)


DATA = as_data()


def adapted() -> nn.Module:
    model = tiny_llama()
    add_lora(model, rank=4, alpha=8.0)
    randomise_adapters(model)
    return model


class _Bounded(torch.autograd.Function):
    """An identity layer that runs out of memory above `memory.tokens` padded tokens, forward or backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, memory: Memory) -> Tensor:
        ctx.memory, ctx.tokens = memory, hidden.shape[0] * hidden.shape[1]
        memory.take(ctx.tokens, "forward")
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.memory.take(ctx.tokens, "backward")
        return grads[0], None


class Memory:
    """Where and above how many tokens the first layer of `model` runs out of memory, and every attempt."""

    def __init__(self, model: Any, tokens: float, where: str = "forward", error: Exception = ERRORS["cuda"]) -> None:
        self.tokens, self.where, self.error = tokens, where, error
        self.attempts: list[int] = []
        self.failed: list[int] = []
        model.model.layers[0].register_forward_hook(lambda _module, _input, out: _Bounded.apply(out, self))

    def take(self, tokens: int, where: str) -> None:
        if where == "forward":
            self.attempts.append(tokens)
        if where == self.where and tokens > self.tokens:
            self.failed.append(tokens)
            raise self.error


def a_step(model: nn.Module, folder: Path, **how: Any) -> PrivateStep:
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = config_for(COUNT, clip_norm=CLIP_NORM)
    return PrivateStep(model, config, ledger=Ledger(folder / "ledger.jsonl"), noise=NoNoise(size), **how)  # type: ignore[arg-type]


def released(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def shapes(budget: int = BUDGET) -> Shapes:
    """So many rows are expected that every micro-batch fills its budget."""
    return Shapes(LONGEST, budget, drawn=1e6)


def micro_batches(budget: int = BUDGET, **how: Any) -> MicroBatches:
    return MicroBatches(DATA, shapes(budget), 0, make_accelerator(), **how)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """The clipped sum over all examples, with unlimited memory."""
    return private_sum(adapted(), EXAMPLES, ALL.tolist(), config_for(COUNT, clip_norm=CLIP_NORM), token_budget=BUDGET)


def make_ahead(patch: pytest.MonkeyPatch) -> None:
    """Batches are made in the background, as where an accelerator computes."""
    patch.setattr(module, "computes_apart", lambda _device: True)


@pytest.fixture(params=[False, True], ids=["in turns", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        make_ahead(monkeypatch)
    return bool(request.param)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("error", "limit"), [("cuda", BUDGET // 2), ("cpu", 3 * LONGEST), ("python", 2 * LONGEST), ("cuda", LONGEST)]
)
def test_out_of_memory_halves_the_budget_and_counts_each_example_once(
    where: str, error: str, limit: int, expected: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted()
    losses = CausalLMLoss(model)
    memory = Memory(model, limit, where, ERRORS[error])
    own = micro_batches()
    with a_step(model, tmp_path) as step:
        seen = own.run(ALL, step, losses, StopRequest())
        step.finish()
        found = released(model) * step.config.divisor
        assert (found - expected).norm() < 1e-6 * expected.norm()
        assert seen is not None
        assert sum(len(stats.losses) for stats in seen) == sum(len(stats.norms) for stats in seen) == COUNT
        assert 1 <= len(memory.failed) <= math.log2(BUDGET / limit) + 1
        assert capsys.readouterr().out.count("out of memory: rank 0 continues with ") == len(memory.failed)
        assert max(memory.attempts[memory.attempts.index(memory.failed[-1]) + 1 :]) <= limit
        failures = len(memory.failed)
        own.run(ALL, step, losses, StopRequest())  # the next step knows
        assert len(memory.failed) == failures


def test_a_plain_step_that_runs_out_of_memory_counts_each_example_once_too() -> None:
    sums = []
    for limit in (float("inf"), 2 * LONGEST):
        model = adapted()
        losses = CausalLMLoss(model)
        memory = Memory(model, limit, "backward")
        with PlainStep(model, 5.0) as step:
            micro_batches().run(ALL, step, losses, StopRequest())
            step.finish()
            sums.append(released(model))
    assert memory.failed
    assert (sums[1] - sums[0]).norm() < 1e-6 * sums[0].norm()


@pytest.mark.usefixtures("ahead")
def test_enough_memory_changes_no_cut(tmp_path: Path) -> None:
    """Each micro-batch runs as it was dealt: cutting it again would need more forward passes."""
    model = adapted()
    losses = CausalLMLoss(model)
    memory = Memory(model, float("inf"))
    with a_step(model, tmp_path) as step:
        seen = micro_batches().run(ALL, step, losses, StopRequest())
    assert seen is not None
    dealt = deal_in_shapes(ALL, DATA.lengths, shapes())
    assert [len(stats.losses) for stats in seen] == [len(rows) for _, (rows,) in dealt]
    assert memory.attempts == [shape.items * shape.width for shape, _ in dealt]
    assert max(memory.attempts) <= BUDGET


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_example_that_does_not_fit_alone_is_refused_with_the_remedy(where: str, tmp_path: Path) -> None:
    model = adapted()
    losses = CausalLMLoss(model)
    Memory(model, LONGEST - 1, where)
    with (
        a_step(model, tmp_path) as step,
        pytest.raises(InvalidArgument, match=rf"block_size: .*single example of {LONGEST} tokens"),
    ):
        micro_batches().run(ALL, step, losses, StopRequest())


def test_ranks_in_step_stop_and_leave_a_smaller_budget_to_the_next_launch(tmp_path: Path) -> None:
    model = adapted()
    losses = CausalLMLoss(model)
    memory = Memory(model, BUDGET // 2)
    with a_step(model, tmp_path) as step, pytest.raises(InvalidArgument, match="max_tokens_per_device") as error:
        micro_batches(in_step=True, folder=tmp_path).run(ALL, step, losses, StopRequest())
    assert str(error.value).startswith(f"max_tokens_per_device={BUDGET}: out of memory")
    assert str(error.value).endswith(f"--resume_from_checkpoint latest resumes with {memory.failed[0] // 2}")
    assert len(memory.failed) == 1
    assert remembered_budget(tmp_path, BUDGET) == memory.failed[0] // 2


@pytest.mark.parametrize("in_step", [True, False])
def test_a_half_added_sum_ends_the_launch_and_leaves_a_smaller_budget(
    in_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is lost, so no rows are put off. Without shards the budget is the user's to choose, as before."""
    model = adapted()
    losses, steady = CausalLMLoss(model), Gathers(model, private=True)
    steady._of_pass = []
    own = micro_batches(in_step=in_step, gathers=steady, folder=tmp_path)
    with a_step(model, tmp_path) as step:

        def half(*_: Any) -> None:
            raise HalfAdded("the step is lost")

        monkeypatch.setattr(step._sums, "add", half)
        with pytest.raises(InvalidArgument if in_step else HalfAdded) as error:
            own.run(ALL, step, losses, StopRequest())
    assert "latest resumes with" in str(error.value) if in_step else str(error.value) == "the step is lost"
    assert (remembered_budget(tmp_path, BUDGET) < BUDGET) is in_step


def test_a_budget_that_did_not_fit_is_remembered_for_the_same_request_only(tmp_path: Path) -> None:
    """Another request, larger or smaller, is used as it is: the user chose it knowing what happened."""
    assert remembered_budget(tmp_path, 512) == 512
    remember_budget(tmp_path, asked=512, fits=256)
    remember_budget(tmp_path, asked=512, fits=384)  # of a rank that had more room
    assert [remembered_budget(tmp_path, asked) for asked in (512, 1024, 300, 100)] == [256, 1024, 300, 100]


@pytest.mark.parametrize("content", ["a lot", "[1]", "{}", '{"asked": 512, "fits": null}', ""])
def test_a_damaged_budget_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / BUDGET_NAME).write_text(content)
    with pytest.raises(InvalidArgument, match="is damaged; remove it"):
        remembered_budget(tmp_path, 512)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_other_errors_pass_through(where: str, tmp_path: Path) -> None:
    model = adapted()
    losses = CausalLMLoss(model)
    memory = Memory(model, 0, where, RuntimeError("CUDA error: device-side assert triggered"))
    with a_step(model, tmp_path) as step, pytest.raises(RuntimeError, match="device-side assert"):
        micro_batches().run(ALL, step, losses, StopRequest())
    assert len(memory.failed) == 1


def test_an_empty_draw_makes_no_forward_pass(tmp_path: Path) -> None:
    model = adapted()
    losses = CausalLMLoss(model)
    memory = Memory(model, 0)
    with a_step(model, tmp_path) as step:
        assert micro_batches().run(NOBODY, step, losses, StopRequest()) == []
        step.finish()
        assert not released(model).any()
    assert not memory.attempts


def test_a_request_before_the_first_micro_batch_ends_it(tmp_path: Path) -> None:
    model = adapted()
    losses = CausalLMLoss(model)
    memory, stop = Memory(model, float("inf")), StopRequest()
    stop.name = "SIGTERM"
    with a_step(model, tmp_path) as step:
        assert micro_batches().run(ALL, step, losses, stop) is None
        assert micro_batches().run(NOBODY, step, losses, stop) is None
    assert not memory.attempts


class Asked:
    """`losses` that receive a stop request in micro-batch `last`."""

    def __init__(self, losses: CausalLMLoss, last: int | None) -> None:
        self.losses, self.last = losses, last
        self.passes, self.stop = 0, StopRequest()

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == self.last:
            self.stop.name = "SIGTERM"
        return self.losses(input_ids, labels)


DEALT = len(deal_in_shapes(ALL, DATA.lengths, shapes(), ranks=2))
CASES: dict[str, dict[str, Any]] = {  # draw; on rank 1 only: the limit of memory, the micro-batch of a request
    "memory": {"draw": ALL, "limit": 2 * LONGEST},
    "empty": {"draw": NOBODY},
    "one": {"draw": np.array([7])},
    "stop": {"draw": ALL, "last": 2},
    "stop in the last": {"draw": ALL, "last": DEALT},
}


def _two_ranks(rank: int, gather: Any, folder: Path) -> dict[str, dict[str, Any]]:
    if rank == 1:
        make_ahead(pytest.MonkeyPatch())  # the process ends with this
    # The group is there already, and accelerate joins it; it only wants to see where one would meet.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ranks = {"gather": gather, "rank": rank, "world_size": 2}
    return {name: _case(case if rank == 1 else {"draw": case["draw"]}, folder, ranks) for name, case in CASES.items()}


def _case(case: dict[str, Any], folder: Path, ranks: dict[str, Any]) -> dict[str, Any]:
    model = adapted()
    losses = Asked(CausalLMLoss(model), case.get("last"))
    memory = Memory(model, case.get("limit", float("inf")))
    own = micro_batches()
    with a_step(model, folder, **ranks) as step:
        seen = own.run(case["draw"], step, losses, losses.stop)
        found: dict[str, Any] = {"passes": losses.passes, "stopped": seen is None, "failed": memory.failed}
        if seen is not None:
            step.finish()
            found["sum"] = released(model) * step.config.divisor
            found["losses"] = own.gathered([stats.losses for stats in seen])
            found["own"] = sum(len(stats.losses) for stats in seen)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(2, _two_ranks, tmp_path_factory.mktemp("ranks"))


def test_one_rank_may_run_out_of_memory_alone(ranks: list[dict[str, Any]], expected: Tensor) -> None:
    one, other = (rank["memory"] for rank in ranks)
    assert not one["failed"]
    assert other["failed"]
    assert other["passes"] > one["passes"]
    assert torch.equal(one["sum"], other["sum"])
    assert (one["sum"] - expected).norm() < 1e-6 * expected.norm()


def test_what_ranks_saw_is_gathered_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    one, other = (rank["memory"] for rank in ranks)
    assert torch.equal(one["losses"], other["losses"])
    assert len(one["losses"]) == one["own"] + other["own"] == COUNT


def test_an_empty_draw_and_an_empty_share_are_steps(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["empty"]["passes"] == 0
        assert not rank["empty"]["sum"].any()
        assert rank["one"]["passes"] == 1  # rank 1 runs the dummy
    assert [rank["one"]["own"] for rank in ranks] == [1, 0]
    alone = private_sum(adapted(), EXAMPLES, [7], config_for(COUNT, clip_norm=CLIP_NORM))
    for rank in ranks:
        assert (rank["one"]["sum"] - alone).norm() < 1e-6 * alone.norm()


def test_a_request_on_one_rank_stops_all_one_micro_batch_later(ranks: list[dict[str, Any]]) -> None:
    assert CASES["stop"]["last"] + 1 < DEALT
    assert [rank["stop"] for rank in ranks] == [{"passes": 3, "stopped": True, "failed": []}] * 2


def test_a_request_in_the_last_micro_batch_stops_all_before_the_step_is_finished(ranks: list[dict[str, Any]]) -> None:
    assert DEALT > 2
    assert ranks[0]["memory"]["passes"] == DEALT
    assert [rank["stop in the last"] for rank in ranks] == [{"passes": DEALT, "stopped": True, "failed": []}] * 2


class Read(TokenizedDataset):
    """Rows that note the thread and the number of each read; one of the reads may fail."""

    failing: int | None = None

    def batch(self, indices: Any, pad_token_id: int, width: int | None = None) -> dict[str, Tensor]:
        if len(indices):  # not the dummy that fills up
            self.reads.append(threading.current_thread())
            if len(self.reads) == self.failing:
                raise OSError("the disk is gone")
        return super().batch(indices, pad_token_id, width)

    def wait_for(self, reads: int) -> None:
        """Return after so many reads; fail if they take some seconds."""
        end = time.monotonic() + 5
        while len(self.reads) < reads:
            assert time.monotonic() < end, f"{len(self.reads)} reads instead of {reads}"
            time.sleep(0.001)

    @cached_property
    def reads(self) -> list[threading.Thread]:
        return []


def read_rows() -> Read:
    return Read(DATA.ids, DATA.is_answer, DATA.starts, num_cut=0)


def test_the_next_batch_is_read_while_this_one_computes(ahead: bool, tmp_path: Path) -> None:
    """Never two ahead, and by one thread."""
    model, data, before = adapted(), read_rows(), threading.active_count()
    own, seen = CausalLMLoss(model), []
    dealt = len(deal_in_shapes(ALL, DATA.lengths, shapes()))

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        data.wait_for(min(len(seen) + 1 + ahead, dealt))
        seen.append(len(data.reads))
        return own(input_ids, labels)

    with a_step(model, tmp_path) as step:
        MicroBatches(data, shapes(), 0, make_accelerator()).run(ALL, step, losses, StopRequest())
    assert dealt > 2
    assert seen == [min(number + ahead, dealt) for number in range(1, dealt + 1)]
    assert len(set(data.reads)) == 1
    assert (threading.main_thread() in data.reads) is not ahead
    assert threading.active_count() == before


def test_the_pieces_of_a_cut_micro_batch_are_read_ahead_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_ahead(monkeypatch)
    model, data = adapted(), read_rows()
    own, losses = MicroBatches(data, shapes(), 0, make_accelerator()), CausalLMLoss(model)
    Memory(model, BUDGET // 2)
    seen: list[int] = []

    def waiting(input_ids: Tensor, labels: Tensor) -> Tensor:
        data.wait_for(min(len(seen) + 2, pieces))
        seen.append(len(data.reads))
        return losses(input_ids, labels)

    with a_step(model, tmp_path) as step:
        own.run(ALL, step, losses, StopRequest())  # cuts
        data.reads.clear()
        own.run(ALL, step, losses, StopRequest())
        pieces = len(data.reads)
        data.reads.clear()
        own.run(ALL, step, waiting, StopRequest())
    assert pieces > len(deal_in_shapes(ALL, DATA.lengths, shapes()))
    assert seen == [min(number + 1, pieces) for number in range(1, pieces + 1)]


@pytest.mark.usefixtures("ahead")
def test_a_read_that_fails_ends_the_draw_at_its_own_micro_batch(tmp_path: Path) -> None:
    model, data, before = adapted(), read_rows(), threading.active_count()
    object.__setattr__(data, "failing", 3)  # it is frozen
    losses = Asked(CausalLMLoss(model), None)
    with a_step(model, tmp_path) as step, pytest.raises(OSError, match="the disk is gone"):
        MicroBatches(data, shapes(), 0, make_accelerator()).run(ALL, step, losses, StopRequest())
    assert losses.passes == 2
    assert threading.active_count() == before


@pytest.mark.usefixtures("ahead")
def test_a_request_leaves_no_thread(tmp_path: Path) -> None:
    model, before = adapted(), threading.active_count()
    losses = Asked(CausalLMLoss(model), 2)
    with a_step(model, tmp_path) as step:
        assert micro_batches().run(ALL, step, losses, losses.stop) is None
    assert losses.passes == 2
    assert threading.active_count() == before


def test_held_out_batches_are_made_ahead_too(ahead: bool) -> None:
    data, before, seen = read_rows(), threading.active_count(), []
    dealt = deal(ALL, DATA.lengths, token_budget=BUDGET, ranks=1)[0]
    for rows, inputs in micro_batches().dealt(data, ALL):
        wanted = min(len(seen) + 1 + ahead, len(dealt))
        data.wait_for(wanted)
        assert len(data.reads) == wanted
        assert torch.equal(inputs["labels"], DATA.batch(rows, 0)["labels"])
        seen.append(rows)
    assert len(dealt) > 2
    assert all(map(np.array_equal, seen, dealt))
    assert threading.active_count() == before


def test_virtual_tokens_count_in_the_budget(expected: Tensor, tmp_path: Path) -> None:
    """Tokens that a model puts before each row need memory like the row's own tokens."""
    shapes: dict[int, list[torch.Size]] = {}
    for virtual in (0, LONGEST):
        model = adapted()
        losses, seen = CausalLMLoss(model), shapes.setdefault(virtual, [])

        def recorded(input_ids: Tensor, labels: Tensor, losses: Any = losses, seen: Any = seen) -> Tensor:
            seen.append(input_ids.shape)
            return losses(input_ids, labels)

        (tmp_path / str(virtual)).mkdir()
        with a_step(model, tmp_path / str(virtual)) as step:
            micro_batches(virtual_tokens=virtual).run(ALL, step, recorded, StopRequest())
            step.finish()
            found = released(model) * step.config.divisor
        assert (found - expected).norm() < 1e-6 * expected.norm()
    assert all(rows * (tokens + LONGEST) <= BUDGET for rows, tokens in shapes[LONGEST])
    assert any(rows * (tokens + LONGEST) > BUDGET for rows, tokens in shapes[0])
