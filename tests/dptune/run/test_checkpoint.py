"""Checkpoints are complete or absent, whatever interrupts a save; damaged ones and those of other runs are refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from dptune import InvalidArgument, Ledger, add_lora, attach_adapter, trainable_parameters
from dptune.adapter_files import WEIGHTS_NAME, adapter_state_dict
from dptune.run.checkpoint import (
    LEDGER_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    TRAINING_STATE_NAME,
    TrainingState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.dptune.test_lora import logits
from tests.full_disk import largest_file
from tests.tiny import tiny_llama

FILES = [LEDGER_NAME, WEIGHTS_NAME, MANIFEST_NAME, OPTIMIZER_NAME, TRAINING_STATE_NAME]
NOISE: dict[str, float] = {"noise_multiplier": 0.9, "sampling_probability": 0.02, "clip_norm": 0.5}


def state_at(step: int, **changes: Any) -> TrainingState:
    """A small state of a run without privacy, told apart by its step."""
    settings: dict[str, Any] = {
        "step": step,
        "ledger_steps": 0,
        "identity": {"run": {"clip_norm": 1.0}},
        "config": {"name": "ε"},
        "weights": {"q_proj.lora.A.weight": torch.full((2, 3), float(step))},
        "optimizer": {"state": {0: {"exp_avg": torch.full((500,), float(step))}}, "param_groups": [{"lr": 0.1}]},
        "schedule": {"last_epoch": step},
    }
    return TrainingState(**(settings | changes))


def saved(run: Path, *steps: int, keep: int | None = None) -> list[Path]:
    return [save_checkpoint(run, state_at(step), None, keep=keep) for step in steps]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidArgument) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("resume_from=")
    return message


class Training:
    """A tiny model with its optimizer and schedule, whose steps depend only on their number."""

    def __init__(self, schedule: str = "linear") -> None:
        self.model: nn.Module = tiny_llama()
        torch.manual_seed(1)
        add_lora(self.model, rank=2, alpha=4.0, targets=("q_proj",))
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.model), lr=1e-2, weight_decay=0.1)
        self.schedule = get_scheduler(schedule, self.optimizer, 2, num_training_steps=9)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(step)
            for parameter in trainable_parameters(self.model):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()
            self.schedule.step()

    def state(self, step: int, ledger_steps: int = 0) -> TrainingState:
        return state_at(
            step,
            ledger_steps=ledger_steps,
            weights=adapter_state_dict(self.model),
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, schedule: str
) -> None:
    whole, first, second = Training(schedule), Training(schedule), Training(schedule)
    whole.run(1, 7)
    first.run(1, 4)
    loaded = load_checkpoint(save_checkpoint(tmp_path, first.state(4), None, keep=None))
    attach_adapter(second.model, tmp_path / "checkpoint-4")
    second.optimizer.load_state_dict(loaded.optimizer)
    second.schedule.load_state_dict(loaded.schedule)
    second.run(loaded.step + 1, 7)
    assert second.schedule.get_last_lr() == whole.schedule.get_last_lr()
    for own, expected in zip(trainable_parameters(second.model), trainable_parameters(whole.model), strict=True):
        assert torch.equal(own, expected)
    assert not torch.equal(
        trainable_parameters(first.model)[0], trainable_parameters(whole.model)[0]
    )  # there was something to clear


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    given = state_at(3, identity={"a": [1, 2.5, None], "b": {"c": True}}, config={"ü": "x\ny", "lr": 1e-300})
    loaded = load_checkpoint(save_checkpoint(tmp_path, given, None, keep=None))
    for field in ("step", "ledger_steps", "identity", "config", "schedule"):
        assert getattr(loaded, field) == getattr(given, field)
    assert torch.equal(loaded.weights["q_proj.lora.A.weight"], torch.full((2, 3), 3.0))
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], torch.full((500,), 3.0))
    assert loaded.optimizer["param_groups"] == [{"lr": 0.1}]
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.step = 4  # type: ignore[misc]


def test_one_can_sample_from_a_checkpoint(tmp_path: Path) -> None:
    training = Training()
    training.run(1, 3)
    folder = save_checkpoint(tmp_path, training.state(3), None, keep=None)
    for path in (folder, folder / WEIGHTS_NAME):
        model = tiny_llama()
        attach_adapter(model, path)
        assert torch.equal(logits(model), logits(training.model))


def test_a_private_run_keeps_a_copy_of_its_ledger_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl")
    for _ in range(3):
        ledger.record(**NOISE)
    folder = save_checkpoint(tmp_path, state_at(2, ledger_steps=3), ledger, keep=None)
    before = ledger.path.read_bytes()
    ledger.record(**NOISE)
    assert (folder / LEDGER_NAME).read_bytes() == before
    assert names(folder) == FILES
    assert load_checkpoint(folder).ledger_steps == 3
    Ledger(ledger.path).require_continues(folder / LEDGER_NAME, 3)


def test_further_files_are_in_the_manifest_too(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, state_at(1), None, keep=None, more={"trainer.json": b"{}"})
    assert (folder / "trainer.json").read_bytes() == b"{}"
    assert load_checkpoint(folder).step == 1
    (folder / "trainer.json").write_bytes(b"[]")
    assert "trainer.json is damaged" in refusal(folder)


def test_a_run_without_privacy_has_no_ledger(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    assert names(folder) == sorted(set(FILES) - {LEDGER_NAME})


def test_a_state_of_another_moment_than_the_ledger_is_not_saved(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl")
    ledger.record(**NOISE)
    for given in (state_at(1), state_at(1, ledger_steps=2)):
        with pytest.raises(RuntimeError, match="in the ledger"):
            save_checkpoint(tmp_path, given, ledger, keep=None)
    with pytest.raises(RuntimeError, match="in the ledger"):
        save_checkpoint(tmp_path, state_at(1, ledger_steps=1), None, keep=None)
    assert names(tmp_path) == ["run.jsonl"]


def test_the_manifest_holds_the_size_and_sum_of_every_other_file(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    files = contents(folder)
    manifest = json.loads(files.pop(MANIFEST_NAME))
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


@pytest.mark.parametrize(
    ("steps", "keep", "left"),
    [
        ([1, 2, 3], None, [1, 2, 3]),
        ([1, 2, 3], 3, [1, 2, 3]),
        ([1, 2, 3], 2, [2, 3]),
        ([8, 9, 10, 11], 2, [10, 11]),
        ([1, 2, 3], 1, [3]),
        ([2, 2, 2], 1, [2]),
        ([10, 20, 30, 15], 2, [10, 15]),
        ([10, 20, 30, 15], 3, [10, 15, 20]),
        ([10, 20, 30, 15], 1, [15]),
    ],
)
def test_the_newest_are_kept_and_the_one_just_written_always_is(
    tmp_path: Path, steps: list[int], keep: int | None, left: list[int]
) -> None:
    (tmp_path / "checkpoint-0x").mkdir()
    saved(tmp_path, *steps[:-1])
    saved(tmp_path, steps[-1], keep=keep)
    assert names(tmp_path) == sorted(["checkpoint-0x", *(f"checkpoint-{step}" for step in left)])
    assert [load_checkpoint(tmp_path / f"checkpoint-{step}").step for step in left] == left


@pytest.mark.parametrize("keep", [0, -1])
def test_a_limit_that_keeps_nothing_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(InvalidArgument, match=f"keep={keep}: "):
        saved(tmp_path, 1, keep=keep)
    assert names(tmp_path) == []


def test_the_same_step_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    other = state_at(2, config={"course": "another"})
    assert load_checkpoint(save_checkpoint(tmp_path, other, None, keep=2)).config == {"course": "another"}
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "a bit at the start": lambda content: flip(content, 0),
    "a bit in the middle": lambda content: flip(content, len(content) // 2),
    "garbage": lambda content: os.urandom(len(content)),
}


@pytest.mark.parametrize("name", [WEIGHTS_NAME, OPTIMIZER_NAME, TRAINING_STATE_NAME, LEDGER_NAME])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_one_before_is_offered(tmp_path: Path, name: str, damage: str) -> None:
    ledger = Ledger(tmp_path / "run.jsonl")
    ledger.record(**NOISE)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state_at(step, ledger_steps=1), ledger, keep=None)
    path = tmp_path / "checkpoint-3" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    message = refusal(tmp_path / "checkpoint-3")
    assert f"{name} is damaged" in message
    assert f"{tmp_path / 'checkpoint-2'}, the newest older intact one" in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    ledger = Ledger(tmp_path / "run.jsonl")
    folder = save_checkpoint(tmp_path, state_at(1), ledger, keep=None)
    (folder / name).unlink()
    assert refusal(folder).endswith(f"{name} is missing; there is no older intact checkpoint")


def test_the_offer_skips_what_is_damaged_too_and_what_is_newer(tmp_path: Path) -> None:
    folders = saved(tmp_path, 8, 9, 10, 11)
    (folders[1] / TRAINING_STATE_NAME).write_text("{}")
    (folders[2] / MANIFEST_NAME).unlink()
    assert f"give {folders[0]}," in refusal(folders[2])
    (folders[0] / OPTIMIZER_NAME).unlink()
    assert "there is no older intact checkpoint" in refusal(folders[2])
    assert load_checkpoint(folders[3]).step == 11


def test_the_offer_is_a_path_that_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2" / TRAINING_STATE_NAME).unlink()
    monkeypatch.chdir(tmp_path / "checkpoint-2")
    offered = refusal(Path(".")).split("give ")[1].split(",")[0]
    assert find_checkpoint(tmp_path, offered) == tmp_path / "checkpoint-1"


def remade(folder: Path, name: str, content: bytes) -> None:
    """Other content with a matching manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        '{"format": 1, "files": {}}',
        '{"format": 2, "files": {}}',
        '{"format": 2, "files": []}',
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (folder,) = saved(tmp_path, 1)
    (folder / MANIFEST_NAME).write_text(text)
    assert f"{MANIFEST_NAME} is damaged" in refusal(folder)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"format": 1}))
    assert f"{MANIFEST_NAME} is damaged or of another version" in refusal(folder)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert load_checkpoint(folder).step == 1


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    manifest["files"]["../secret"] = manifest["files"][TRAINING_STATE_NAME]
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert f"{MANIFEST_NAME} is damaged" in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, OPTIMIZER_NAME, TRAINING_STATE_NAME])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"step": 2}', b"PK\x03\x04"])
def test_a_file_that_cannot_be_read_is_refused_though_the_manifest_agrees(
    tmp_path: Path, name: str, content: bytes
) -> None:
    folders = saved(tmp_path, 1, 2)
    remade(folders[1], name, content)
    message = refusal(folders[1])
    assert "cannot be read (" in message
    assert str(folders[0]) in message


class _Code:
    """The content of a malicious file: a call that the unpickler would make."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, OPTIMIZER_NAME])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, name: str) -> None:
    (folder,) = saved(tmp_path, 1)
    marker = tmp_path / "executed"
    torch.save({"optimizer": _Code(marker)}, tmp_path / "bad.pt")
    remade(folder, name, (tmp_path / "bad.pt").read_bytes())
    refusal(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Code(marker)))
    assert marker.exists()  # the call would have been run


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    """It would count as the latest checkpoint forever."""
    (folder,) = saved(tmp_path, 5)
    folder.rename(tmp_path / "checkpoint-50")
    assert "holds step 5; rename it to checkpoint-5" in refusal(tmp_path / "checkpoint-50")


def test_no_folder_at_all_is_refused(tmp_path: Path) -> None:
    assert f"{MANIFEST_NAME} is missing" in refusal(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("size", [0, 1, 700, 2500])
def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_else(tmp_path: Path, size: int) -> None:
    saved(tmp_path, 1, 2)
    before = [contents(tmp_path / name) for name in names(tmp_path)]
    for step in (2, 3):  # an existing checkpoint, and a new one
        with largest_file(size), pytest.raises(InvalidArgument) as caught:
            saved(tmp_path, step, keep=1)
        assert str(caught.value) == (
            f"run_folder={str(tmp_path)!r}: checkpoint-{step} could not be written (File too large); free space, "
            "then resume from the latest"
        )
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
        assert [contents(tmp_path / name) for name in names(tmp_path)] == before
    saved(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(("code", "remedy"), [(errno.ENOSPC, "free space"), (errno.EDQUOT, "free space"), (5, "fix")])
@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
@pytest.mark.parametrize("good_calls", [0, 1, 3])
def test_whatever_call_the_disk_refuses_the_checkpoint_of_before_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, good_calls: int, code: int, remedy: str
) -> None:
    saved(tmp_path, 1)
    original, calls = getattr(os, call), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == good_calls + 1:
            raise OSError(code, os.strerror(code))
        return original(*args)

    monkeypatch.setattr(os, call, failing)
    try:
        save_checkpoint(tmp_path, state_at(1, config={"course": "another"}), None, keep=None)
        written = True
    except InvalidArgument as error:
        written, message = False, str(error)
    assert written == (call == "rename" and good_calls == 3)  # three renames: aside, in place, away
    if not written:
        assert f"could not be written ({os.strerror(code)}); {remedy}" in message
    config = {"course": "another"} if written else {"name": "ε"}
    assert load_checkpoint(tmp_path / "checkpoint-1").config == config
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_full_disk_before_the_first_checkpoint_says_that_there_is_none(tmp_path: Path) -> None:
    with largest_file(0), pytest.raises(InvalidArgument, match="free space, then start again: there is no other"):
        saved(tmp_path, 1)
    assert names(tmp_path) == []


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 1)
    assert names(tmp_path) == []


CALLS = ("fsync", "rename", "replace", "unlink", "rmdir")


def die_at(call: int, save: Callable[[], object]) -> bool:
    """Run `save` in a process that dies before its `call`-th call of `CALLS`. Returns whether it finished."""
    pid = os.fork()
    if pid == 0:
        made = 0

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def function(*args: Any, **kwargs: Any) -> Any:
                nonlocal made
                made += 1
                if made == call:
                    os._exit(9)
                return original(*args, **kwargs)

            return function

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            save()
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 0


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_run_killed_at_any_moment_of_a_save_has_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    """The only checkpoint is replaced by one of the same step or of the next, with `keep=1`."""
    seen = []
    for call in range(1, 100):
        run = tmp_path / str(call)
        run.mkdir()
        saved(run, 1)
        new = state_at(step, config={"course": "another"})
        ended = die_at(call, lambda run=run, new=new: save_checkpoint(run, new, None, keep=1))  # type: ignore[misc]
        latest = find_checkpoint(run, "latest")
        assert latest is not None
        loaded = load_checkpoint(latest)
        seen.append(loaded.config)
        assert loaded.config in ({"name": "ε"}, {"course": "another"})
        saved(run, 3, keep=2)
        assert {name for name in names(run) if name.startswith(".")} == set()
        assert load_checkpoint(run / "checkpoint-3").step == 3
        shutil.rmtree(run)
        if ended:
            break
    assert call > 15
    changed = seen.index({"course": "another"})
    assert changed > 10
    assert {json.dumps(config) for config in seen[changed:]} == {'{"course": "another"}'}


def test_every_file_is_on_disk_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    events: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path.parent).as_posix())

    def rename(source: Path, target: Path) -> None:
        real_rename(source, target)
        events.append(f"{Path(source).name} -> {Path(target).name}")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    saved(tmp_path, 2)
    (named,) = [index for index, event in enumerate(events) if event.endswith("-> checkpoint-2")]
    hidden = events[named].split(" -> ")[0]
    assert hidden.startswith(".")
    synced = [event.partition(f"{hidden}/")[2].lstrip(".").rpartition(".tmp")[0] for event in events[:named]]
    order = [entry.rpartition(".")[0] for entry in synced if entry]
    assert order == [WEIGHTS_NAME, OPTIMIZER_NAME, TRAINING_STATE_NAME, MANIFEST_NAME]
    assert events[named - 1] == f"{tmp_path.name}/{hidden}"
    assert events[named + 1] == tmp_path.name


@pytest.mark.filterwarnings("error")
def test_leftovers_of_crashed_saves_are_removed(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for name in (".checkpoint-2.0a1b2c3d.tmp", ".checkpoint-1.0a1b2c3d.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / OPTIMIZER_NAME).write_bytes(b"half")
    (tmp_path / ".config").mkdir()
    saved(tmp_path, 3)
    assert names(tmp_path) == [".config", "checkpoint-1", "checkpoint-3"]


def test_a_folder_that_cannot_be_removed_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)

    def resisting(_: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", resisting)
        with pytest.warns(UserWarning, match=r"checkpoint-1 cannot be removed \(Device or resource busy\)"):
            saved(tmp_path, 2, keep=1)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["checkpoint-2"]
    saved(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_latest_is_the_highest_step_of_what_has_a_checkpoints_name(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "nothing", "latest") is None
    for name in (
        "checkpoint-",
        "checkpoint-x",
        "checkpoint--1",
        "checkpoint-012",
        "old-checkpoint-99",
        "checkpoint-9b",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-77").write_text("a file")
    (tmp_path / ".checkpoint-88.0a1b2c3d.tmp").mkdir()
    assert find_checkpoint(tmp_path, "latest") is None
    saved(tmp_path, 9, 10, 2)
    assert find_checkpoint(str(tmp_path), "latest") == tmp_path / "checkpoint-10"


def test_a_path_names_a_checkpoint_of_this_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    saved(run, 1, 2)
    monkeypatch.chdir(tmp_path)
    for given in ("run/checkpoint-1", "run/checkpoint-1/", str(run / "checkpoint-1"), "run/../run/checkpoint-1"):
        assert find_checkpoint(run, given) == run / "checkpoint-1"
    assert find_checkpoint("run", str(run / "checkpoint-2")) == Path("run/checkpoint-2")


@pytest.mark.parametrize(
    "given",
    ["run", "other/checkpoint-1", "run/deep/checkpoint-1", "run/checkpoint-7", "run/checkpoint-1/state.json", ""],
)
def test_a_path_of_something_else_is_refused_with_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """A checkpoint of another folder belongs to another ledger, so its releases would not be counted."""
    for folder in ("run", "other", "run/deep"):
        (tmp_path / folder).mkdir()
        saved(tmp_path / folder, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument) as caught:
        find_checkpoint("run", given)
    assert str(caught.value) == (
        f"resume_from={given!r}: is not a checkpoint of this run; give latest, or one of run/checkpoint-1"
    )


def test_a_path_is_refused_where_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="holds no checkpoint yet; give latest, or leave it out"):
        find_checkpoint(tmp_path, "checkpoint-1")
