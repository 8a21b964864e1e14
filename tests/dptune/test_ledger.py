"""The ledger counts what is on disk, survives a torn line, and refuses files that are not ledgers."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dptune import InvalidArgument, Ledger, accounting
from dptune._words import counted
from dptune.accounting import Cut, Spend
from dptune.keystream import FIXED, SECRET
from dptune.sampling import CUT_SAMPLER, FIXED_KEY, NOT_SHOWN, SAMPLER
from tests.full_disk import largest_file

STEP: dict[str, float] = {"noise_multiplier": 0.9, "sampling_probability": 0.02, "clip_norm": 0.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def written(path: Path, steps: int) -> Ledger:
    ledger = Ledger(path)
    for _ in range(steps):
        ledger.record(**STEP)
    return ledger


def test_nothing_recorded_is_nothing_spent(path: Path) -> None:
    ledger = Ledger(path)
    assert (ledger.steps, ledger.spends, ledger.epsilon(1e-5), ledger.running_epsilon(1e-5)) == (0, [], 0, 0)
    assert not path.exists()


def test_each_line_is_on_disk_when_record_returns(path: Path) -> None:
    ledger = Ledger(path)
    for step in (1, 2, 3):
        ledger.record(**STEP)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == ledger.steps == step
        assert lines[-1] == {"step": step, **STEP}


def test_reopening_counts_and_goes_on(path: Path) -> None:
    written(path, 3)
    again = Ledger(path)
    assert again.steps == 3
    again.record(**STEP)
    assert Ledger(path).spends == [Spend(0.9, 0.02, 4)]
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 4


@pytest.mark.parametrize("torn", ['{"step": 3, "noise_mul', "{", '{"step": 3, "noise_multiplier": 0.9}'])
def test_a_torn_last_line_is_dropped_and_writing_goes_on(path: Path, torn: str) -> None:
    """Its gradient was never used, because a line only counts once its end is on disk."""
    written(path, 2)
    with path.open("a") as file:
        file.write(torn)
    again = Ledger(path)
    assert again.steps == 2
    again.record(**STEP)
    assert Ledger(path).steps == 3
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "",
        "[1, 2]",
        "7",
        '{"step": 2, "noise_multiplier": 0.9}',
        '{"step": 2, "noise_multiplier": "many", "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": null, "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": NaN, "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": -0.9, "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": 0.9, "sampling_probability": 0}',
        '{"step": 2, "noise_multiplier": 0.9, "sampling_probability": 1.5}',
        '{"step": 3, "noise_multiplier": 0.9, "sampling_probability": 0.02}',
    ],
)
def test_a_line_that_is_no_entry_is_refused_with_its_number(path: Path, line: str) -> None:
    written(path, 1)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InvalidArgument) as caught:
        Ledger(path)
    assert f"{path}:2" in str(caught.value)
    assert "restore the file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ledger_that_lost_a_line_is_refused(path: Path) -> None:
    """The ledger would count less than was spent."""
    written(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    with pytest.raises(InvalidArgument, match=r"ledger\.jsonl:2"):
        Ledger(path)


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00garbage\n")
    with pytest.raises(InvalidArgument, match=r"ledger\.jsonl:1"):
        Ledger(path)


def test_epsilon_of_mixed_settings_composes_all_of_them(path: Path) -> None:
    ledger = written(path, 3)
    other: dict[str, Any] = {"noise_multiplier": 0.7, "sampling_probability": 0.05, "clip_norm": 0.5}
    ledger.record(**other)
    ledger.record(**STEP)
    spends = [Spend(0.9, 0.02, 4), Spend(0.7, 0.05, 1)]
    assert ledger.spends == Ledger(path).spends == spends
    epsilon = ledger.epsilon(1e-5)
    assert epsilon == accounting.compose(spends, delta=1e-5)
    assert epsilon > accounting.compose(spends[:1], delta=1e-5)
    assert epsilon <= ledger.running_epsilon(1e-5) <= 1.01 * epsilon


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"sampler": NOT_SHOWN}, "nothing shows that 1 step got Poisson draws: give PrivateStep its sampler"),
        (
            {"sampler": FIXED_KEY},
            "the batches of 1 step were drawn under a fixed key, so anyone can tell who was drawn",
        ),
        ({"sampler": "shuffled"}, "the batches of 1 step were drawn by an unknown sampler, shuffled"),
        ({"noise_key": FIXED}, "the noise of 1 step came from a fixed key, so anyone can reproduce it"),
        ({"noise_key": "guessed"}, "the noise of 1 step came from a guessed key, so anyone can reproduce it"),
    ],
)
def test_a_line_without_a_shown_secret_draw_and_secret_noise_leaves_no_epsilon(
    path: Path, how: dict[str, str], reason: str
) -> None:
    ledger = written(path, 3)
    assert ledger.reasons == ()
    ledger.record(**STEP, **how)
    assert ledger.reasons == Ledger(path).reasons == (reason,)
    assert math.isinf(Ledger(path).epsilon(1e-5))


def test_a_line_without_a_kind_of_noise_key_is_of_a_secret_key(path: Path) -> None:
    """Earlier versions wrote such lines for any key, and those steps had an epsilon."""
    path.write_text(json.dumps({"step": 1, **STEP}) + "\n")
    ledger = Ledger(path)
    assert (ledger.noise_keys, ledger.reasons) == ({SECRET: 1}, ())
    ledger.record(**STEP, noise_key=FIXED)
    assert Ledger(path).noise_keys == ledger.noise_keys == {SECRET: 1, FIXED: 1}


def test_a_line_that_cannot_be_written_is_not_counted(path: Path) -> None:
    ledger = Ledger(path)
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        ledger.record(**STEP)
    assert ledger.steps == 0


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("fitting", [0, 1, 40])
def test_a_full_disk_counts_nothing_and_writing_goes_on_when_there_is_space(
    path: Path, steps: int, fitting: int
) -> None:
    ledger = written(path, steps)
    before = path.read_bytes() if steps else b""
    for _ in range(2):
        with largest_file(len(before) + fitting), pytest.raises(OSError, match="File too large"):
            ledger.record(**STEP)
        assert ledger.steps == steps
        assert ledger.content() == before
    assert path.read_bytes().startswith(before)
    ledger.record(**STEP)
    ledger.record(**STEP)
    assert Ledger(path).steps == ledger.steps == steps + 2
    assert path.read_bytes() == ledger.content() == written(path.with_name("other"), steps + 2).content()


def test_a_torn_line_of_a_full_disk_is_no_step_after_a_crash(path: Path) -> None:
    ledger = written(path, 2)
    with largest_file(len(ledger.content()) + 30), pytest.raises(OSError, match="File too large"):
        ledger.record(**STEP)
    assert len(path.read_bytes()) == len(ledger.content()) + 30
    assert Ledger(path).steps == 2


def test_a_line_that_could_not_be_synced_is_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is complete in the file, but maybe not on disk, so its gradient was not used."""
    ledger = written(path, 2)

    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            ledger.record(**STEP)
    assert ledger.steps == 2
    assert Ledger(path).steps == 3  # a run that ends here counts it: one too many is safe
    ledger.record(noise_multiplier=0.7, sampling_probability=0.02, clip_norm=0.5)
    assert Ledger(path).spends == ledger.spends == [Spend(0.9, 0.02, 2), Spend(0.7, 0.02, 1)]


@pytest.mark.parametrize("foreign", [None, b"x", b'{"step": 3'])
def test_two_runs_with_one_ledger_are_refused_and_no_line_is_cut(path: Path, foreign: bytes | None) -> None:
    """One process would overwrite or misnumber the other's steps."""
    ledger = written(path, 2)
    if foreign is None:
        Ledger(path).record(**STEP)
    else:
        path.write_bytes(path.read_bytes() + foreign)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match=r"ledger\.jsonl'?: another process writes to it"):
        ledger.record(**STEP)
    assert path.read_bytes() == before
    assert ledger.steps == 2


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-1])]
)
def test_a_file_that_loses_lines_while_in_use_is_refused(path: Path, spoil: Callable[[Path], object]) -> None:
    ledger = written(path, 2)
    spoil(path)
    for call in (lambda: ledger.record(**STEP), ledger.content):
        with pytest.raises(InvalidArgument, match="lost lines while it was in use; epsilon would be too small"):
            call()
    assert ledger.steps == 2


def test_the_content_is_the_counted_lines(path: Path) -> None:
    assert Ledger(path).content() == b""
    ledger = written(path, 2)
    assert ledger.content() == path.read_bytes()
    assert Ledger(path).content() == path.read_bytes()


@pytest.fixture
def copy(path: Path) -> Path:
    """A checkpoint's copy of the ledger, made after three steps."""
    copied = path.with_name("copy.jsonl")
    copied.write_bytes(written(path, 3).content())
    return copied


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_ledger_may_have_more_steps_than_the_checkpoint(path: Path, copy: Path, more: int) -> None:
    """These steps were released and run again, so both count."""
    ledger = written(path, more)
    before = path.read_bytes()
    ledger.require_continues(copy, 3)
    assert path.read_bytes() == before
    assert ledger.steps == 3 + more


def test_a_torn_line_behind_the_checkpoints_is_no_obstacle(path: Path, copy: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"step": 4, "noi')
    ledger = Ledger(path)
    ledger.require_continues(copy, 3)
    ledger.record(**STEP)
    assert path.read_bytes().startswith(copy.read_bytes())
    assert Ledger(path).steps == 4


def test_who_reads_a_ledger_leaves_it_as_it_is(path: Path) -> None:
    """A line that looks torn may be one that another process is writing."""
    written(path, 2)
    content = path.read_bytes() + b'{"step": 3, "noi'
    path.write_bytes(content)
    assert [spend.steps for spend in Ledger(path).spends] == [2]
    assert path.read_bytes() == content


def test_a_run_that_had_released_nothing_continues_any_ledger(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for steps in (0, 2):
        ledger = written(path, steps)
        ledger.require_continues(tmp_path / "empty", 0)
        assert ledger.steps == Ledger(path).steps == steps, "what was released stays counted"


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_ledger_with_fewer_steps_than_the_checkpoint_is_refused(path: Path, copy: Path, left: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:left]))
    with pytest.raises(InvalidArgument) as caught:
        Ledger(path).require_continues(copy, 3)
    assert f"has {counted(left, 'line')}, but the checkpoint already has 3; epsilon would be too small" in str(
        caught.value
    )
    assert path.read_bytes() == b"".join(lines[:left])


def test_a_missing_ledger_is_refused(path: Path, copy: Path) -> None:
    path.unlink()
    with pytest.raises(InvalidArgument, match="has 0 lines, but the checkpoint already has 3"):
        Ledger(path).require_continues(copy, 3)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("change", [(b"0.9", b"9.0"), (b"0.5", b"0.6"), (b": ", b":  ")])
def test_a_line_that_reads_otherwise_is_refused_with_its_number(
    path: Path, copy: Path, number: int, change: tuple[bytes, bytes]
) -> None:
    """Lines with more noise than was added make epsilon too small, and more lines do not make up for it."""
    written(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(*change)
    path.write_bytes(b"".join(lines))
    with pytest.raises(InvalidArgument) as caught:
        Ledger(path).require_continues(copy, 3)
    assert f"{path}:{number}" in str(caught.value)
    assert "differs from the checkpoint's copy" in str(caught.value)


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_copy_that_is_not_of_the_checkpoints_step_is_refused(path: Path, copy: Path, steps: int) -> None:
    with pytest.raises(InvalidArgument, match=f"has 3 lines, but its checkpoint counts {steps};"):
        Ledger(path).require_continues(copy, steps)


# --- cut draws ---

CUT_STEP: dict[str, Any] = {**STEP, "sampler": CUT_SAMPLER, "cut": Cut(30, 1000)}


def test_a_line_of_a_cut_draw_says_where_it_was_cut_and_how_many_examples_there_are(path: Path) -> None:
    written(path, 2)
    ledger = Ledger(path)
    for _ in range(3):
        ledger.record(**CUT_STEP)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {"step": 2, **STEP}, "as before without a cut"
    assert lines[2] == {"step": 3, **STEP, "sampler": "Poisson, cut", "max_batch": 30, "num_examples": 1000}
    spends = [Spend(0.9, 0.02, 2), Spend(0.9, 0.02, 3, 1, Cut(30, 1000))]
    for one in (ledger, Ledger(path)):
        assert (one.spends, one.reasons) == (spends, ())
        assert (
            one.epsilon(1e-5)
            == accounting.compose(spends, delta=1e-5)
            > accounting.compose([Spend(0.9, 0.02, 5)], delta=1e-5)
        )
        assert one.running_epsilon(1e-5) >= one.epsilon(1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_batch": None},
        {"num_examples": None},
        {"max_batch": 0},
        {"max_batch": "30"},
        {"max_batch": True},
        {"num_examples": 1e3},
        {"sampler": "Poisson"},
        {"sampler": None},
        {"group_size": 2},
    ],
)
def test_a_line_whose_cut_does_not_fit_is_refused(path: Path, changed: dict[str, Any]) -> None:
    """A line without its cut would cost less. None removes a value."""
    entry = {"step": 1, **STEP, "sampler": CUT_SAMPLER, "max_batch": 30, "num_examples": 1000} | changed
    path.write_text(json.dumps({name: value for name, value in entry.items() if value is not None}) + "\n")
    with pytest.raises(InvalidArgument, match=r"ledger\.jsonl:1.*is not a ledger entry"):
        Ledger(path)


@pytest.mark.parametrize("changed", [{"cut": None}, {"sampler": SAMPLER}])
def test_a_step_whose_sampler_and_cut_disagree_is_not_recorded(path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"^cut=.*does not fit the sampler"):
        Ledger(path).record(**CUT_STEP | changed)
    assert not path.exists()


@pytest.mark.parametrize("sampler", [FIXED_KEY, NOT_SHOWN, "Poisson, cut twice"])
def test_a_cut_hides_no_reason_against_a_guarantee(path: Path, sampler: str) -> None:
    Ledger(path).record(**CUT_STEP | {"sampler": sampler})
    assert len(Ledger(path).reasons) == 1
    assert Ledger(path).epsilon(1e-5) == math.inf


# --- noise bands ---

BANDS_STEP: dict[str, Any] = {**STEP, "sampler": "Poisson, cyclic", "noise_bands": 4}


def test_turns_are_counted_block_by_block_and_rounded_up(path: Path) -> None:
    written(path, 1)
    ledger = Ledger(path)
    for steps in (5, 3, 8):
        block = ledger.begin_block()
        for _ in range(steps):
            ledger.record(**BANDS_STEP, block=block)
    assert json.loads(path.read_text().splitlines()[-1]) == {
        "step": 17, **STEP, "sampler": "Poisson, cyclic", "noise_bands": 4, "block": 3,
    }  # fmt: skip
    for one in (ledger, Ledger(path)):
        assert (one.steps, one.reasons, one.noise_bands) == (17, (), {1, 4})
        assert one.spends == [Spend(0.9, 0.02, 1), Spend(0.9, 4 * 0.02, 2 + 1 + 2)]
        assert one.turns == 6
        assert one.spends_after(1)[1].steps == 6, "the last block is full"
        assert one.spends_after(4)[1].steps == 6
        assert one.epsilon(1e-5) == accounting.compose(one.spends, delta=1e-5)
        firsts = [sum(spend.steps for spend in one.spends_of_first(steps)) for steps in (1, 2, 5, 6, 7, 9, 10, 17)]
        assert firsts == [1, 1 + 1, 1 + 1, 1 + 2, 1 + 2 + 1, 1 + 2 + 1, 1 + 2 + 1 + 1, 6]
    assert Ledger(path).begin_block() == 4
    assert Ledger(path.with_name("none")).spends_after(3) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"block": None},
        {"noise_bands": None},
        {"noise_bands": 1},
        {"noise_bands": 4.0},
        {"noise_bands": 51},
        {"block": 0},
        {"block": "1"},
        {"sampler": None},
        {"sampler": CUT_SAMPLER},
        {"group_size": 2},
    ],
)
def test_a_line_of_noise_bands_that_does_not_hold_is_refused(changed: dict[str, Any], path: Path) -> None:
    line = {"step": 1, **BANDS_STEP, "block": 1}
    path.write_text(json.dumps(line) + "\n")
    assert Ledger(path).turns == 1
    line |= changed
    path.write_text(json.dumps({name: value for name, value in line.items() if value is not None}) + "\n")
    with pytest.raises(InvalidArgument, match="is not a ledger entry"):
        Ledger(path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"noise_bands": 1}, "noise_bands=1: do not fit the sampler, Poisson, cyclic"),
        ({"sampler": "Poisson"}, "noise_bands=4: do not fit the sampler, Poisson;"),
        ({}, "block=0: must come from begin_block"),
    ],
)
def test_a_step_whose_bands_do_not_fit_is_not_recorded(changed: dict[str, Any], told: str, path: Path) -> None:
    with pytest.raises(InvalidArgument, match=told):
        Ledger(path).record(**BANDS_STEP | changed)
    assert not path.exists()
