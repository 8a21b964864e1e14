"""The tables for large models are right where they can be checked; small ones hold and send what is predicted."""

from __future__ import annotations

import re
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import lengths, memory_table, ranks, sharding
from benchmarks.ranks import Job, RankMemory, measure
from benchmarks.sharding import SHAPES, ShardingArguments
from dptune import InvalidArgument
from dptune.sharding import ShardedBytes
from utils.models.memory import RESERVE

GIB = 1 << 30
JOB = Job(SHAPES["tiny"], block=64, token_budget=256, draw=8, rank=16, processes=2, sharded=True, checkpointing=False)


def arguments(*flags: str) -> ShardingArguments:
    (args,) = sharding.parse(ShardingArguments, args=["--shape", "tiny", *flags])
    return args


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table's rows, without its header."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()][2:]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Llama 7B", 6_738_415_616), ("Llama 13B", 13_015_864_320), ("Llama 70B", 68_976_648_192)],
)
def test_the_large_models_have_the_published_numbers_of_parameters(name, parameters):
    sizes = memory_table.llama_sizes(name)
    assert sizes.frozen == parameters
    rows = rows_of(memory_table.scaling_table(name))
    assert [int(row[0]) for row in rows] == list(memory_table.GPUS)
    for row in rows:
        assert float(row[1]) == pytest.approx(2 * parameters / int(row[0]) / GIB, abs=0.006)
    whole, *sharded = [float(row[2]) for row in rows]
    assert whole == 0
    assert set(sharded) == {round(2 * (3 * sizes.layer + sizes.root) / GIB, 2)}


def test_more_gpus_and_checkpointing_need_less_and_more_tokens_more():
    for name in memory_table.LLAMAS:
        peaks = np.array(
            [[float(cell.split()[0]) for cell in row[3:]] for row in rows_of(memory_table.scaling_table(name))]
        )
        assert (np.diff(peaks, axis=0) < 0).all()
        short, short_again, long, long_again = peaks.T
        assert (short_again < short).all()
        assert (long_again < long).all()
        assert (short < long).all()


def test_a_card_is_the_smallest_that_fits_with_the_reserve():
    needs = memory_table.needs_of("Llama 7B", gpus=1, tokens=512, checkpointing=False)
    room = 24 * GIB - RESERVE
    exact = replace(needs, frozen_weights=needs.frozen_weights + room - needs.total)
    assert exact.total == room
    assert memory_table.card(exact) == "24"
    assert memory_table.card(replace(exact, frozen_weights=exact.frozen_weights + 1)) == "48"
    assert memory_table.card(replace(exact, frozen_weights=100 * GIB)) == "-"


def test_the_parts_do_not_depend_on_the_number_of_gpus():
    one, many = (memory_table.needs_of("Llama 13B", gpus=gpus, tokens=512, checkpointing=False) for gpus in (2, 64))
    assert replace(one, frozen_weights=0, finish=0) == replace(many, frozen_weights=0, finish=0)
    assert 0 < one.finish - many.finish < 128 << 20  # a rank's own part of what is gathered at a time, in float64
    labels = [row[0] for row in rows_of(memory_table.parts_table())]
    assert labels[:3] == [
        "activations of the base",
        "activations of the base, checkpointing",
        "activations of the adapters",
    ]


@pytest.mark.parametrize(("checkpointing", "whole"), [(False, False), (True, False), (True, True)])
def test_two_processes_hold_and_send_what_is_predicted(checkpointing, whole):
    large = {"hidden_size": 320, "intermediate_size": 880, "num_key_value_heads": 4, "num_hidden_layers": 8}
    shape = JOB.shape | (large if whole else {})
    seen = measure(replace(JOB, checkpointing=checkpointing, whole=whole, shape=shape))
    assert len(seen) == 2
    for one in seen:
        one.held.require_bound(2)
        assert one.held.held < 0.6 * one.held.total
        assert one.sent == pytest.approx(one.predicted_sent, rel=0.02)
        assert 0.85 < one.peak / one.predicted_peak < 1.1


def test_a_process_that_fails_ends_the_measurement():
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="ended without a result"):
        measure(replace(JOB, token_budget=0))
    assert time.monotonic() - begin < 60


def test_the_others_do_not_wait_for_a_process_that_failed():
    workers = [
        ranks._CONTEXT.Process(target=sys.exit, args=(3,)),
        ranks._CONTEXT.Process(target=time.sleep, args=(300,)),
    ]
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    ranks._wait(workers)
    assert time.monotonic() - begin < 60
    for worker in workers:
        worker.join(10)
    assert workers[0].exitcode == 3
    assert workers[1].exitcode == -signal.SIGKILL


def test_jobs_are_one_process_and_several_with_and_without_shards():
    jobs = sharding.jobs(arguments("--processes", "3"))
    kinds = [(job.processes, job.sharded, job.checkpointing) for job in jobs]
    layouts = [(1, False), (3, False), (3, True)]
    assert kinds == 2 * [(*layout, checkpointing) for checkpointing in (False, True) for layout in layouts]
    assert [job.whole for job in jobs] == 6 * [False] + 6 * [True]
    assert len(sharding.jobs(arguments("--processes", "1"))) == 4


def test_dealing_is_counted_by_hand():
    micro_batches, padding, slowest = sharding.dealt_evenly(np.array([10, 10, 10, 6]), 2, 10)
    assert micro_batches == 2  # each holds one row of two examples: 10 and 10, then 10 and 6
    assert padding == 0
    assert slowest == pytest.approx(20 / 18 - 1)
    _, padding, _ = sharding.dealt_evenly(np.array([100, 95]), 1, 200)
    assert padding == pytest.approx(5 / 200)


def test_sixty_four_examples_a_rank_are_dealt_evenly():
    table = np.array([sum(one) for one in lengths.table("abstracts")])
    rng = np.random.default_rng(1)
    for count in (2, 8):
        _, padding, slowest = sharding.dealt_evenly(rng.choice(table, 64 * count), count, 2048)
        assert padding < 0.05
        assert slowest < 0.05


def test_the_result_has_all_sections_and_is_written(tmp_path, monkeypatch, capsys):
    seen: list[Job] = []

    def measured(job: Job) -> list[RankMemory]:
        seen.append(job)
        low = RankMemory(ShardedBytes(1 << 20, 3 << 20, 1 << 20), 4 << 20, 5 << 20, 6 << 20, 7 << 20)
        return [low, replace(low, peak=10 << 20)]

    monkeypatch.setattr(sharding, "measure", measured)
    monkeypatch.setattr(sys, "argv", ["sharding.py", "--shape", "tiny"])
    output = tmp_path / "results" / "sharding.md"
    sharding.main(arguments("--output", str(output)))
    written = output.read_text()
    assert written == capsys.readouterr().out.removesuffix("\n")
    assert "`python -m benchmarks.sharding --shape tiny`" in written
    for heading in ("## On paper", "### Llama 70B", "## Measured", "## Dealing a draw"):
        assert heading in written
    assert len(seen) == 12
    # The rank that needed most; a shard's bound is total / processes + root group.
    assert "| LoRA, 2 processes, sharded | 1.0 | 2.5 | 10.0 | 5.0 | 2.00 | 6.0 | 7.0 |" in written
    assert "| all trained, 1 process, checkpointing | 1.0 | 3.0 | 10.0 |" in written


def test_paper_only_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sharding, "measure", lambda job: pytest.fail(f"{job} was run"))
    sharding.main(arguments("--paper_only"))
    assert "## Measured" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["block", "max_tokens", "draw", "processes", "rank"])
def test_mistakes_are_refused(flag):
    with pytest.raises(InvalidArgument, match=re.escape(f"--{flag}=0")):
        arguments(f"--{flag}", "0")
