"""The benchmark runs, compares like with like, and says who was left out."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from benchmarks import lengths, measure, models, peers, rounds, settings, step, tables
from benchmarks.arguments import BenchmarkArguments
from benchmarks.contenders import PLAIN, PRIVATE, Job, Ours
from dptune import InvalidArgument
from tests.benchmarks.comparing import assert_same, in_this_process, rows_of, trained, updates

CPU = torch.device("cpu")
SMALL = ["--shape", "tiny", "--device", "cpu", "--rounds", "2", "--block", "12", "--ragged_block", "24", "--draw", "6"]


def arguments(*flags: str) -> BenchmarkArguments:
    (args,) = step.parse(BenchmarkArguments, args=[*SMALL, *flags])
    return args


def small_job(*, batch: int, examples: int) -> Job:
    base = models.load(None, "tiny", dtype="float32", device=CPU)
    return Job(base=base, device=CPU, batch=batch, block=24, examples=examples, rank=4, gradient_ckpt=False)


def test_both_settings_are_measured_and_written(tmp_path, monkeypatch):
    output = tmp_path / "results" / "step.md"
    monkeypatch.setattr(sys, "argv", ["step.py", *SMALL])
    step.main(arguments("--contenders", "private", "plain", "peft", "--no_memory", "--output", str(output)))
    written = output.read_text()
    assert "python -m benchmarks.step --shape tiny" in written
    assert f"torch {torch.__version__.partition('+')[0]}" in written  # a package's version may lack +cu130
    for heading in ("## Fixed: 4 x 12 tokens", "## Ragged: 6 examples"):
        part = written[written.index(heading) :].split("\n## ")[0]
        rows = rows_of(part)
        assert set(rows) == {PLAIN, peers.PEFT}
        assert all(float(cell.split()[0]) > 0 for cells in rows.values() for cell in cells[:3])
        assert [cells[-1] for cells in rows.values()] == ["2", "2"], "rounds"
        assert f"Goal beside {PLAIN}: seconds at most 1.020 of its. {rows[PLAIN][0].split()[0]}: " in part
        assert f"Goal beside {peers.PEFT}: " in part


@pytest.mark.parametrize("gradient_ckpt", [False, True])
def test_ours_run_in_bfloat16_with_and_without_checkpointing(gradient_ckpt):
    args = arguments("--dtype", "bfloat16", *(["--gradient_ckpt"] if gradient_ckpt else []))
    setting = settings.setting_of(args, "ragged")
    job = settings.job_of(args, setting)
    assert {parameter.dtype for parameter in job.base.parameters()} == {torch.bfloat16}
    for private in (True, False):
        contender = Ours(job, private=private)
        adapters = trained(contender)
        before = [parameter.clone() for parameter in adapters]
        contender.step(settings.draws_of(setting, job, 1)[0])
        contender.close()
        assert any(not torch.equal(old, new) for old, new in zip(before, adapters, strict=True))


def test_memory_is_measured_in_a_fresh_process():
    args = arguments("--threads", "1")
    memory = measure.in_fresh_process(settings.measure_memory, args, settings.setting_of(args, "fixed"), PRIVATE)
    assert 50 << 20 < memory.empty < memory.before <= memory.peak < 4 << 30
    table = tables.memory(PRIVATE, {PRIVATE: memory})
    assert int(rows_of(table)[PRIVATE][0]) == round(memory.peak / 2**20)


def test_the_peak_holds_what_a_step_let_go_of():
    class Hungry:
        name = "hungry"

        def step(self, _: lengths.Draw) -> None:
            torch.ones(64 << 20, dtype=torch.uint8)

        def close(self) -> None:
            """Nothing."""

    torch.ones(256 << 20, dtype=torch.uint8)  # an older and higher peak, which must not hide the step's
    memory = measure.memory_of(Hungry(), [[]], CPU)
    assert 60 << 20 < memory.peak - memory.before < 120 << 20


def test_ratios_are_of_times_of_the_same_round():
    seconds = {PRIVATE: [2.0, 9.0, 4.0], PLAIN: [1.0, 3.0, 4.0]}
    rows = rows_of(tables.pairs(PRIVATE, [(seconds, [20, 90, 80])]))
    ratio, own_speed, speed, own_time, time, count = rows[PLAIN]
    assert ratio == "2.000 (1.000 to 3.000)"
    assert (own_speed, speed) == ("10 (10 to 20)", "20 (20 to 30)")
    assert (own_time, time, count) == ("4.00 (2.00 to 9.00)", "3.00 (1.00 to 4.00)", "3")
    alone = rows_of(tables.pairs(PRIVATE, [({PRIVATE: [2.0]}, [10])]))
    assert alone[PRIVATE][0] == "1.000 (1.000 to 1.000)"


class Recorded:
    """A contender that writes down its turns."""

    def __init__(self, name: str, turns: list[tuple[str, int]]) -> None:
        self.name, self.turns = name, turns

    def step(self, draw: lengths.Draw) -> None:
        self.turns.append((self.name, len(draw)))

    def close(self) -> None:
        """Nothing."""


def test_contenders_alternate_over_the_same_draws_and_warmup_does_not_count():
    turns: list[tuple[str, int]] = []
    draws = [[(torch.zeros(1), torch.zeros(1))] * size for size in (1, 2, 3)]
    players = [Recorded("a", turns), Recorded("b", turns)]
    seconds = measure.alternate(players, draws, warmup=1, device=CPU, max_seconds=1e9)
    assert turns == [("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


def test_a_turn_begins_with_a_short_step_that_does_not_count():
    turns: list[tuple[str, int]] = []
    draws = [[(torch.zeros(1), torch.zeros(1))] * 5] * 2
    players = [Recorded("a", turns), Recorded("b", turns)]
    measure.alternate(players, draws, warmup=0, warm_examples=2, device=CPU, max_seconds=1e9)
    assert turns == [("a", 2), ("a", 5), ("b", 2), ("b", 5), ("b", 2), ("b", 5), ("a", 2), ("a", 5)]


def test_rounds_end_with_the_time_but_one_always_counts():
    draws: list[lengths.Draw] = [[]] * 5
    seconds = measure.alternate([Recorded("a", [])], draws, warmup=2, device=CPU, max_seconds=1e-9)
    assert len(seconds["a"]) == 1


def test_a_peer_that_is_not_installed_or_fails_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda package: None if package == "opacus" else package)
    monkeypatch.setattr(peers, "make", lambda _, job: job.no_such_thing)
    monkeypatch.setattr(rounds, "in_fresh_process", in_this_process)
    args = arguments("--setting", "fixed", "--no_memory", "--contenders", "plain", "peft", "opacus", "opacus-ghost")
    result = step.run_setting(args, "fixed")
    assert not rows_of(result)
    assert f"Left out: {peers.PEFT}: failed with AttributeError: " in result
    for name in (peers.OPACUS_HOOKS, peers.OPACUS_GHOST):
        assert f"Left out: {name}: not installed: opacus." in result


def test_a_failure_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(Ours, "step", lambda _, draw: draw.no_such_thing)
    monkeypatch.setattr(rounds, "in_fresh_process", in_this_process)
    with pytest.raises(AttributeError, match="no_such_thing"):
        step.run_setting(arguments("--contenders", "private"), "fixed")


def test_without_privacy_ours_and_peft_make_the_same_update(monkeypatch):
    job = small_job(batch=2, examples=6)
    (draw,) = lengths.draws([(0, 24)], 1, examples=6, block=24, vocabulary=400)
    ours, theirs = updates([PLAIN, peers.PEFT], job, draw, monkeypatch)
    assert_same(ours, theirs)


@pytest.mark.parametrize("clip_norm", [0.02, 1e3])  # every example clipped, and none
def test_private_ours_and_opacus_make_the_same_update(monkeypatch, clip_norm):
    pytest.importorskip("opacus", reason="Opacus is a peer of the benchmark only: pip install '.[bench]' to compare")
    job = small_job(batch=2, examples=5)
    (draw,) = lengths.draws([(2, 5), (4, 9), (0, 20)], 1, examples=5, block=24, vocabulary=400)
    ours, hooks, ghost = updates(
        [PRIVATE, peers.OPACUS_HOOKS, peers.OPACUS_GHOST], job, draw, monkeypatch, clip_norm=clip_norm
    )
    assert_same(hooks, ours)
    assert_same(ghost, ours)


def test_draws_repeat_and_are_cut_and_labelled_as_the_lengths_say():
    sizes = {"examples": 50, "block": 10, "vocabulary": 7}
    first, second = (lengths.draws([(3, 4), (2, 90)], 2, **sizes) for _ in range(2))
    for one, other in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(one[0], other[0])
    assert {(len(ids), int(labels.eq(lengths.IGNORE).sum())) for ids, labels in first[0]} == {(7, 3), (10, 2)}
    assert lengths.tokens(first[0]) == sum(len(ids) for ids, _ in first[0])
    ids, labels, mask = lengths.padded(first[0], CPU)
    assert ids.shape == labels.shape == mask.shape == (50, 10)
    assert int(mask.sum()) == lengths.tokens(first[0])
    assert bool(labels[mask == 0].eq(lengths.IGNORE).all())


@pytest.mark.parametrize(("name", "mean"), [("abstracts", (250, 500)), ("chat", (25, 60))])
def test_the_committed_lengths_are_those_of_text(name, mean):
    totals = [prompt + answer for prompt, answer in lengths.table(name)]
    assert len(totals) == 1000
    assert min(totals) > 3
    assert mean[0] < sum(totals) / len(totals) < mean[1]


def test_a_text_file_gives_lengths(tmp_path, tiny_model_dir):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps(row) for row in [{"text": "abc"}, {"instruction": "ab", "answer": "xyz"}]))
    args = arguments()
    args.model, args.shape, args.text = str(tiny_model_dir), None, str(text)
    assert settings._real_lengths(args) == [(0, 4), (2, 4)]
    text.write_text(json.dumps({"abstract": "abc"}))
    with pytest.raises(InvalidArgument, match=r"text\.jsonl:1.*neither `text` nor `answer`"):
        settings._real_lengths(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "x"], "give exactly one of --model and --shape"),
        (["--text", "x"], "needs the tokenizer"),
        (["--batch", "0"], "--batch=0"),
        (["--threads", "0"], "--threads=0"),
        (["--device", "tpu"], "--device='tpu'"),
    ],
)
def test_mistakes_are_refused(flags, message):
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        arguments(*flags)


def test_unknown_lengths_and_models_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="abstracts, chat"):
        lengths.table("novels")
    with pytest.raises(InvalidArgument, match="--model="):
        models.load(str(tmp_path), None, dtype="float32", device=CPU)
