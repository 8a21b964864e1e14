"""The benchmark of full fine-tuning: equal work is compared, and every figure and goal is in the result."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from benchmarks import full_finetuning, largest_batch, lengths, measure, models, rounds, settings, tables
from benchmarks.arguments import ALL_PARAMETERS, FullFinetuningArguments
from benchmarks.contenders import PLAIN, PRIVATE, Contender, Job
from benchmarks.measure import Memory
from benchmarks.peers import OPACUS_GHOST_ALL, OPACUS_HOOKS_ALL, PLAIN_LOOP
from benchmarks.rounds import Pair, Result
from dptune import InvalidArgument
from tests.benchmarks.comparing import assert_same, rows_of, trained, updates

CPU = torch.device("cpu")
SMALL = ["--shape", "gpt2-tiny", "--device", "cpu", "--rounds", "2", "--batch", "2", "--block", "12", "20"]
OPACUS = "Opacus is a peer of the benchmark only: pip install '.[bench]' to compare"


def arguments(*flags: str) -> FullFinetuningArguments:
    (args,) = full_finetuning.parse(FullFinetuningArguments, args=[*SMALL, *flags])
    return args


def whole_job(shape: str, *, batch: int, examples: int, copied: bool = True) -> Job:
    base = models.load(None, shape, dtype="float32", device=CPU)
    sizes = {"batch": batch, "block": 24, "examples": examples}
    return Job(base=base, device=CPU, **sizes, rank=None, gradient_ckpt=False, copied=copied)


def one_draw(sizes: list[lengths.Length], examples: int) -> lengths.Draw:
    (draw,) = lengths.draws(sizes, 1, examples=examples, block=24, vocabulary=400)
    return draw


@pytest.mark.parametrize("shape", ["gpt2-tiny", "gpt2-tiny-untied"])
def test_without_privacy_ours_and_the_plain_loop_make_the_same_update(monkeypatch, shape):
    job, draw = whole_job(shape, batch=2, examples=6), one_draw([(0, 24)], 6)
    base = [parameter.clone() for parameter in job.base.parameters()]
    ours, theirs, private = updates([PLAIN, PLAIN_LOOP, PRIVATE], job, draw, monkeypatch, clip_norm=1e3)
    assert len(ours) == sum(parameter.numel() for parameter in job.base.parameters())
    assert_same(ours, theirs)
    assert_same(private, theirs)  # no example is as long as 1e3
    assert all(torch.equal(old, new) for old, new in zip(base, job.base.parameters(), strict=True))


@pytest.mark.parametrize("clip_norm", [0.02, 1e3])  # every example clipped, and none
def test_private_ours_and_opacus_make_the_same_update(monkeypatch, clip_norm):
    pytest.importorskip("opacus", reason=OPACUS)
    job, draw = whole_job("gpt2-tiny-untied", batch=2, examples=5), one_draw([(2, 5), (4, 9), (0, 20)], 5)
    names = [PRIVATE, OPACUS_HOOKS_ALL, OPACUS_GHOST_ALL]
    ours, hooks, ghost = updates(names, job, draw, monkeypatch, clip_norm=clip_norm)
    assert_same(hooks, ours)
    assert_same(ghost, ours)


def test_opacus_trains_an_output_layer_of_its_own():
    pytest.importorskip("opacus", reason=OPACUS)
    job = whole_job("gpt2-tiny", batch=2, examples=2)
    counts = {name: count_of(settings.make(name, job)) for name in (PLAIN_LOOP, OPACUS_HOOKS_ALL)}
    assert counts[OPACUS_HOOKS_ALL] == counts[PLAIN_LOOP] + 400 * 32
    assert job.base.get_output_embeddings().weight is job.base.get_input_embeddings().weight
    text = full_finetuning.about(arguments())
    assert f"{counts[PLAIN_LOOP] / 1e6:.1f} million" in text
    assert f"({counts[OPACUS_HOOKS_ALL] / 1e6:.1f} million in all)" in text
    assert "except for Opacus" not in full_finetuning.about(arguments("--shape", "gpt2-tiny-untied"))


def count_of(contender: Contender) -> int:
    return sum(parameter.numel() for parameter in trained(contender))


def test_a_process_of_one_contender_trains_the_loaded_model_itself():
    job = whole_job("gpt2-tiny", batch=2, examples=2, copied=False)
    assert job.own_model() is job.base
    assert all(parameter.requires_grad for parameter in job.base.parameters())


def in_this_process(function, args, setting, names):
    """What a new process would do; its memory as it would be of a large model (here the pages are there already)."""
    measured = function(args, setting, names)
    if function is rounds.time_pair:
        return measured
    assert 0 <= measured.needed < 1 << 30
    return Memory(before=1 << 30, peak=(4 << 30) + (setting.batch << 28), empty=1 << 29)


def test_every_figure_is_measured_and_written(tmp_path, monkeypatch):
    pytest.importorskip("opacus", reason=OPACUS)
    for module in (rounds, largest_batch):
        monkeypatch.setattr(module, "in_fresh_process", in_this_process)
    monkeypatch.setattr(sys, "argv", ["full_finetuning.py", *SMALL])
    output = tmp_path / "results" / "full.md"
    flags = [
        "--rounds",
        "1",
        "--accumulate",
        "2",
        "1",
        "--warmup",
        "0",
        "--limit_tokens",
        "40",
        "60",
        "--output",
        str(output),
    ]
    full_finetuning.main(arguments(*flags))
    written = output.read_text()
    assert "python -m benchmarks.full_finetuning --shape gpt2-tiny" in written
    assert "Left out" not in written
    sections = {part.splitlines()[0]: rows_of(part) for part in written.split("\n## ")}
    for block in (12, 20):
        for accumulate in (2, 1):
            rows = sections[f"T={block}: {accumulate} x 2 x {block} tokens per step"]
            assert list(rows) == [*list(ALL_PARAMETERS.values())[1:], PRIVATE]
            assert all(float(cell.split()[0]) > 0 for cells in rows.values() for cell in cells[:3])
            assert rows[PRIVATE][-1] == "1.000"
        assert set(sections[f"Largest micro-batch of {block} tokens within 24 GiB"]) == {PRIVATE, PLAIN, PLAIN_LOOP}
    per_block = ["seconds, T={}, 2 x 2", "memory, T={}, 2 x 2", "seconds, T={}, 1 x 2", "memory, T={}, 1 x 2"]
    wanted = [row.format(block) for block in (12, 20) for row in [*per_block, "largest micro-batch, T={}"]]
    assert [row for row in sections["Goals"] if not row.startswith("private over")] == wanted


def test_goals_are_judged_by_ratios_of_private_over_not_private():
    seconds = {PRIVATE: [2.0, 3.0, 9.0], PLAIN: [2.0, 2.0, 4.0], PLAIN_LOOP: [2.0, 3.0, 8.0]}
    mib = 1 << 20
    memory = {PRIVATE: Memory(0, 340 * mib, 100 * mib), PLAIN: Memory(0, 300 * mib, 100 * mib)}
    memory[PLAIN_LOOP] = Memory(0, 320 * mib, 100 * mib)
    names = (PLAIN, PLAIN_LOOP)
    pairs = {name: Pair({key: seconds[key] for key in (PRIVATE, name)}, [1, 1, 1], {}) for name in names}
    rows = full_finetuning.goals_of(Result(PRIVATE, pairs, memory, {}), 8, 128, 4)
    assert rows == [
        ["seconds, T=128, 4 x 8", "at most 1.1", "1.500: missed", "1.000: reached"],
        ["memory, T=128, 4 x 8", "at most 1.05", "1.200: missed", "1.091: missed"],
    ]
    (longer,) = full_finetuning.goals_of(Result(PRIVATE, pairs, {}, {}), 8, 512, 4)
    assert longer == ["seconds, T=512, 4 x 8", "none", "1.500", "1.000"]
    assert rows_of(tables.memory(PRIVATE, memory))[PLAIN] == ["300", "300", "200", "1.200"]


def test_the_largest_batch_is_where_the_line_meets_the_limit():
    gib = 1 << 30
    lines = {
        PRIVATE: largest_batch.fit({4: 6 * gib, 8: 10 * gib, 12: 14 * gib}),
        PLAIN: largest_batch.fit({4: 5 * gib, 8: 9 * gib}),
        PLAIN_LOOP: largest_batch.fit({4: 5 * gib, 8: 5 * gib}),
    }
    assert (lines[PRIVATE].fixed / gib, lines[PRIVATE].per_example / gib) == pytest.approx((2, 1))
    assert lines[PRIVATE].off < 1e-9
    assert lines[PRIVATE].largest(24.5 * gib) == 22
    assert lines[PRIVATE].largest(gib) == 0
    assert lines[PLAIN_LOOP].largest(24 * gib) is None
    assert largest_batch.fit({1: 2 * gib, 2: 4 * gib, 3: 3 * gib}).off == pytest.approx(1 / 4)
    row = full_finetuning.goal_of_batch(lines, 128, 24.5)
    assert row == ["largest micro-batch, T=128", "at least 0.95", "0.957: reached", "not measured"]
    row = full_finetuning.goal_of_batch(lines, 128, 8.5)
    assert row[2] == "0.857: missed"
    text = largest_batch.section(lines, 128, 24.5)
    assert rows_of(text)[PRIVATE] == ["6144", "10240", "14336", "2048", "1024.0", "0.0%", "22"]


def test_the_peak_is_of_two_micro_batches_after_a_step_that_made_the_optimizers_state(monkeypatch):
    seen: list[list[int]] = []

    def memory_of(_: Contender, draws: list[lengths.Draw], *__: object, **___: object) -> Memory:
        seen.append([len(draw) for draw in draws])
        return Memory(1, 2, 0)

    monkeypatch.setattr(settings, "memory_of", memory_of)
    for accumulate in (1, 4):
        settings.measure_memory(arguments(), settings.fixed(3, 12, accumulate), PLAIN)
    assert seen == [[1, 3], [1, 6]]


def test_memory_before_the_model_does_not_count():
    class Idle:
        name = "idle"

        def step(self, _: lengths.Draw) -> None:
            """Nothing."""

        def close(self) -> None:
            """Nothing."""

    empty = measure.memory_now(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    memory = measure.memory_of(Idle(), [[]], CPU, empty=empty)
    assert len(held) <= memory.needed + (4 << 20) < 96 << 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block", "0"], "--block=0"),
        (["--limit_tokens", "40", "41"], "give at least two sizes"),
        (["--limit_gib", "0"], "--limit_gib"),
        (["--accumulate", "4", "0"], "--accumulate=0"),
    ],
)
def test_mistakes_are_refused(flags, message):
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        arguments(*flags)
