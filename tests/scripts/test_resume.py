"""train_clm.py stopped in every way that one process can be stopped, and resumed: nothing is lost, and epsilon covers
everything that was released."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import train_clm
from dptune import accounting, ledger, step_sums
from dptune.ledger import Ledger
from dptune.ranks import Ranks
from dptune.run import checkpoint
from dptune.run.lock import FolderLock
from tests.faults import write_examples
from tests.scripts.test_train_clm import flags
from tests.tiny import save_tiny
from utils.training.arguments import ON_RESUME
from utils.training.causal_lm import run as causal_lm_run
from utils.training.changes import OnResume
from utils.training.log import read_diagnostics
from utils.training.micro_batches import MicroBatches, remember_budget

pytestmark = pytest.mark.usefixtures("no_plots")

DELTA, STEPS = 1e-3, 9
SETTINGS: dict[str, object] = {"num_train_epochs": None, "max_train_steps": STEPS, "checkpointing_steps": 3}


class Crash(Exception):
    """Stands for any event that ends a process."""


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "data.json")


@pytest.fixture
def line(tiny_model_dir, train_file, tmp_path):
    """The command line of a run in `tmp_path/run` (or `out=`), with flags changed."""

    def make(**changes: object) -> list[str]:
        out = changes.pop("out", tmp_path / "run")
        return flags(tiny_model_dir, train_file, out, **SETTINGS | changes)

    return make


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Crash in step `number` between its ledger line and its gradient: the worst moment."""
    calls = iter(range(1, 10_000))
    real = step_sums.sum_over_ranks

    def fail(*args, **kwargs):
        if next(calls) == number:
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(step_sums, "sum_over_ranks", fail)


def report_of(out: Path) -> dict[str, object]:
    return json.loads((out / "publish" / "privacy_report.json").read_text())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "publish" / "lora_weights.bin", weights_only=True)


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused run prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_clm.main(line)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def crash(line: list[str], number: int) -> None:
    """Run until step `number` crashes."""
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, number)
        with pytest.raises(Crash):
            train_clm.main(line)


@pytest.fixture(scope="module")
def crashed_once(tiny_model_dir: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crashed") / "run"
    crash(flags(tiny_model_dir, train_file, out, **SETTINGS), 8)
    return out


@pytest.fixture
def crashed(crashed_once: Path, tmp_path: Path) -> Path:
    """A run that crashed in its eighth step: checkpoints after 3 and 6, eight lines in the ledger."""
    return Path(shutil.copytree(crashed_once, tmp_path / "run"))


def test_steps_that_ran_twice_count_twice(crashed, line, capsys):
    assert Ledger(crashed / "ledger.jsonl").steps == 8
    train_clm.main(line(resume_from_checkpoint="latest"))
    report, ledger = report_of(crashed), Ledger(crashed / "ledger.jsonl")
    assert ledger.steps == report["steps"] == 8 + (STEPS - 6)
    assert report["repeated_steps"] == 2
    once = accounting.epsilon(noise_multiplier=0.8, sampling_probability=16 / 64, steps=STEPS, delta=DELTA)
    assert report["epsilon"] == pytest.approx(ledger.epsilon(DELTA))
    assert report["epsilon"] > once + 0.1
    assert "repeated steps         2" in capsys.readouterr().out
    assert "2" in (crashed / "publish" / "README.md").read_text()


def test_the_diagnostics_are_those_of_one_run(crashed, line):
    train_clm.main(line(resume_from_checkpoint="latest"))
    rows = read_diagnostics(crashed / "diagnostics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))


def test_an_older_checkpoint_repeats_more(crashed, line):
    train_clm.main(line(resume_from_checkpoint=crashed / "checkpoint-3"))
    assert report_of(crashed)["repeated_steps"] == 8 - 3


def test_repeats_draw_fresh_noise_and_fresh_batches(crashed, line, tmp_path):
    """Two runs from one checkpoint: no secret was saved, so they differ."""
    shutil.copytree(crashed, tmp_path / "other")
    train_clm.main(line(resume_from_checkpoint="latest"))
    train_clm.main(line(resume_from_checkpoint="latest", out=tmp_path / "other"))
    ours, theirs = weights_of(crashed), weights_of(tmp_path / "other")
    assert all(not torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("weight"))
    drawn = [
        [row.get("batch_drawn") for row in read_diagnostics(run / "diagnostics.jsonl")]
        for run in (crashed, tmp_path / "other")
    ]
    assert drawn[0][:7] == drawn[1][:7]


@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_norm": -1, "noise_multiplier": -1}, {"lora_dropout": 0.3}],
    ids=["private", "plain", "private, dropout"],
)
def test_with_repeatable_randomness_a_stopped_run_ends_as_one_that_was_not(changes, line, tmp_path, monkeypatch):
    """A signal comes in the middle of step 5; another in step 8."""
    how = {"insecure_test_seed": 4, "lr_scheduler_type": "cosine", "num_warmup_steps": 2} | changes
    train_clm.main(line(**how, out=tmp_path / "calm"))
    ends = []
    for number, name in ((5, signal.SIGTERM), (3, signal.SIGINT)):
        with monkeypatch.context() as patch:
            signal_in_step(patch, number, name)
            train_clm.main(line(**how, resume_from_checkpoint="latest"))
            ends.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")))
            assert not (tmp_path / "run" / "publish" / "privacy_report.json").exists()
    assert ends == [["checkpoint-3", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    train_clm.main(line(**how, resume_from_checkpoint="latest"))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    report = report_of(tmp_path / "run")
    assert report["guarantee"] == "none"
    assert report["steps"] == STEPS
    assert report["repeated_steps"] == 0


def signal_in_step(patch: pytest.MonkeyPatch, number: int, name: signal.Signals) -> None:
    """The process gets a signal in a micro-batch of the `number`th step from now."""
    run = MicroBatches.run
    calls = iter(range(1, 10_000))

    def signalled(self, draw, *args):
        if next(calls) == number:
            os.kill(os.getpid(), name)
        return run(self, draw, *args)

    patch.setattr(MicroBatches, "run", signalled)


def test_a_stop_says_where_it_is_and_how_to_resume(line, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        signal_in_step(patch, 2, signal.SIGTERM)
        train_clm.main(line(checkpointing_steps=0))
    assert f"SIGTERM: stopped after step 1 of {STEPS}, saved in" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert Ledger(tmp_path / "run" / "ledger.jsonl").steps == 1, "the unfinished step released nothing"


CHANGED = {
    "clip_norm": ({"clip_norm": 0.5}, "clip_norm was 1.0 in the checkpoint and is 0.5 now"),
    "sigma": ({"noise_multiplier": 0.9}, "noise_multiplier was 0.8 in the checkpoint and is 0.9 now"),
    "q": ({"gradient_accumulation_steps": 2}, "sampling_probability was 0.25 in the checkpoint and is 0.125 now"),
    "delta": ({"delta": 1e-4}, "delta was 0.001"),
    "rank": ({"lora_r": 8}, "lora_r was 4 in the checkpoint and is 8 now"),
    "alpha": ({"lora_alpha": 8}, "lora_alpha was 16.0 in the checkpoint and is 8.0 now"),
    "seed": ({"seed": 1}, "seed was 0 in the checkpoint and is 1 now"),
    "optimizer": ({"optimizer": "dp-adam"}, "optimizer was 'adamw' in the checkpoint and is 'dp-adam' now"),
    "scale": ({"use_rslora": True}, "use_rslora was False in the checkpoint and is True now"),
    "unread style": ({"automatic_gamma": 0.1}, "automatic_gamma was 0.01 in the checkpoint and is 0.1 now"),
    "whole model": ({"trainable": "norms"}, "trainable was None in the checkpoint and is 'norms' now"),
    "shorter": ({"block_size": 24}, "training_data was"),
    "targets": ({"lora_target_modules": "lm_head"}, "adapters.lm_head[0] was absent"),
    "prompts": ({"prompt_style": "chat"}, "training_data was"),
    "randomness": ({"insecure_test_seed": 1}, "insecure_test_seed was None"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_run_is_not_resumed(name, crashed, line, capsys):
    changes, wanted = CHANGED[name]
    before = {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}
    assert wanted in refused(line(resume_from_checkpoint="latest", **changes), capsys)
    if name != "targets":  # a model's difference shows when it is loaded
        assert before == {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("crashed")
def test_other_data_and_another_model_are_not_resumed(line, tmp_path, capsys):
    other = json.loads(write_examples(tmp_path / "other.json").read_text())
    other["answer"][3] = "something else"
    (tmp_path / "other.json").write_text(json.dumps(other))
    told = refused(line(resume_from_checkpoint="latest", train_file=tmp_path / "other.json"), capsys)
    assert "training_data was" in told
    assert "something else" not in told
    model = save_tiny(tmp_path / "model", seed=1)
    assert "base_model was" in refused(line(resume_from_checkpoint="latest", model_name_or_path=model), capsys)


def test_what_cannot_change_epsilon_may_change(crashed, line):
    changes = {"max_tokens_per_device": 60, "gradient_ckpt": True, "learning_rate": 0.001, "max_train_steps": STEPS + 1}
    train_clm.main(line(resume_from_checkpoint="latest", **changes))
    assert report_of(crashed)["steps"] == 8 + (STEPS + 1 - 6)
    config = json.loads((crashed / "run_config.json").read_text())
    assert (config["learning_rate"], config["max_train_steps"]) == (0.02, STEPS)
    assert config["changes"] == [{"from_step": 7, "max_train_steps": STEPS + 1, "learning_rate": 0.001}]
    assert (config["max_tokens_per_device"], config["gradient_ckpt"]) == (60, True)  # as they are now


# --- flags that take effect ---

# {flag: (another value, flags of the run so far)}; the noise is repeatable, so that a run differs by the flag alone.
EFFECTIVE = {
    "learning_rate": (0.001, {}),
    "weight_decay": (0.5, {}),
    "momentum": (0.9, {"optimizer": "sgd"}),
    "lr_scheduler_type": ("constant", {}),
    "num_warmup_steps": (8, {}),
    "warmup_ratio": (0.9, {}),
    "lora_dropout": (0.5, {}),
    "token_dropout": (0.3, {}),
    "max_train_steps": (STEPS + 1, {}),
    "num_train_epochs": (3, {"max_train_steps": None, "num_train_epochs": 2.25}),
    "validation_file": ("{train_file}", {}),
}


def test_each_flag_that_takes_effect_is_tested():
    assert EFFECTIVE.keys() == {name for name, kind in ON_RESUME.items() if kind is OnResume.EFFECTIVE}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_a_flag_that_may_change_takes_effect_and_is_recorded_from_its_step(name, line, train_file, tmp_path, capsys):
    value, how = EFFECTIVE[name]
    value, how = str(train_file) if name == "validation_file" else value, {"insecure_test_seed": 2} | how
    crash(line(**how, out=tmp_path / "same"), 8)
    shutil.copytree(tmp_path / "same", tmp_path / "changed")
    again = {"resume_from_checkpoint": "latest"} | how
    train_clm.main(line(**again, out=tmp_path / "same"))
    train_clm.main(line(**again | {name: value}, out=tmp_path / "changed"))
    same, changed = tmp_path / "same", tmp_path / "changed"
    assert f"changed                {name} from " in capsys.readouterr().out
    old, config = (json.loads((one / "run_config.json").read_text()) for one in (same, changed))
    assert config["changes"] == [{"from_step": 7, name: value}]
    assert config[name] == old[name] != value
    assert "changes" not in old
    rows = [read_diagnostics(one / "diagnostics.jsonl") for one in (same, changed)]
    if name == "validation_file":
        assert [[row["step"] for row in run if "eval_loss" in row] for run in rows] == [[], [9]]
    else:
        ours, theirs = weights_of(same), weights_of(changed)
        assert all(not torch.equal(ours[key], theirs[key]) for key in ours if key.endswith("B.weight"))


def test_the_rate_of_the_first_step_after_the_checkpoint_is_the_new_one(crashed, line):
    train_clm.main(line(resume_from_checkpoint="latest", learning_rate=0.001, lr_scheduler_type="constant"))
    rates = [row.get("learning_rate") for row in read_diagnostics(crashed / "diagnostics.jsonl")]
    assert rates[7:] == [0.001] * 3
    assert rates[6] == pytest.approx(0.02 * (1 - 5 / STEPS))


def test_the_history_of_changes_follows_the_checkpoint_that_is_resumed(crashed, line, monkeypatch):
    """Changed at step 7, again at step 9 of a run that had been changed; then resumed from before both."""
    with monkeypatch.context() as patch:
        signal_in_step(patch, 3, signal.SIGTERM)
        train_clm.main(line(resume_from_checkpoint="latest", learning_rate=0.004))
    train_clm.main(line(resume_from_checkpoint="latest", learning_rate=0.005))
    config = json.loads((crashed / "run_config.json").read_text())
    history = [{"from_step": 7, "learning_rate": 0.004}, {"from_step": 9, "learning_rate": 0.005}]
    assert (config["learning_rate"], config["changes"]) == (0.02, history)
    train_clm.main(line(resume_from_checkpoint="latest", learning_rate=0.006))  # no step is left
    assert json.loads((crashed / "run_config.json").read_text())["changes"] == history
    train_clm.main(line(resume_from_checkpoint=crashed / "checkpoint-8", learning_rate=0.02))
    config = json.loads((crashed / "run_config.json").read_text())
    assert config["changes"] == [history[0], {"from_step": 9, "learning_rate": 0.02}]


@pytest.mark.usefixtures("crashed")
def test_a_run_does_not_start_again_over_itself(line, capsys):
    assert "holds a run already" in refused(line(), capsys)


def test_latest_starts_a_run_if_there_is_none(line, tmp_path):
    train_clm.main(line(resume_from_checkpoint="latest", max_train_steps=1))
    assert report_of(tmp_path / "run")["steps"] == 1


def test_a_ledger_that_lost_lines_is_refused(crashed, line, capsys):
    ledger = crashed / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:4]))
    assert "ledger" in refused(line(resume_from_checkpoint="latest"), capsys)
    ledger.unlink()
    assert "ledger" in refused(line(resume_from_checkpoint="latest"), capsys)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_works(crashed, line, capsys):
    weights = crashed / "checkpoint-6" / "optimizer.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    told = refused(line(resume_from_checkpoint="latest"), capsys)
    assert "optimizer.pt is damaged" in told
    assert str(crashed / "checkpoint-3") in told
    train_clm.main(line(resume_from_checkpoint=crashed / "checkpoint-3"))
    assert report_of(crashed)["repeated_steps"] == 5


def test_the_budget_ends_a_run_before_the_step_that_would_exceed_it(line, tmp_path, capsys):
    budget = {"noise_multiplier": None, "target_epsilon": 3}
    crash(line(**budget), 8)
    train_clm.main(line(**budget, resume_from_checkpoint="latest"))
    report = report_of(tmp_path / "run")
    assert report["steps"] == STEPS, "9 steps are what 3 pays for: 8 were released, so one is left"
    assert report["repeated_steps"] == 2
    assert report["epsilon"] <= 3
    assert f"after step 7 of {STEPS}: one more would exceed the target epsilon" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-7").is_dir()


def full_when(patch: pytest.MonkeyPatch, module: ModuleType, name: str, is_full: Callable[[Path], bool]) -> None:
    """The disk is full for the calls of `module.name(path, content)` that `is_full` picks."""
    real = getattr(module, name)

    def write(path: Path, content: object) -> None:
        if is_full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    patch.setattr(module, name, write)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_intact(line, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        full_when(patch, checkpoint, "_write_file", lambda path: ".checkpoint-6." in str(path))
        told = refused(line(), capsys)
    assert "No space left on device" in told
    assert "resume from the latest" in told
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-0", "checkpoint-3"]
    train_clm.main(line(resume_from_checkpoint="latest"))
    assert report_of(tmp_path / "run")["repeated_steps"] == 3


def test_a_disk_that_is_full_for_the_ledger_stops_before_the_step_is_used(line, monkeypatch, tmp_path, capsys):
    calls = iter(range(1, 100))
    with monkeypatch.context() as patch:
        full_when(patch, ledger, "append_line", lambda _: next(calls) == 5)
        told = refused(line(), capsys)
    assert "No space left on device" in told
    train_clm.main(line(resume_from_checkpoint="latest"))
    assert report_of(tmp_path / "run")["steps"] == 4 + (STEPS - 3)


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_are_deleted(limit, line, tmp_path):
    train_clm.main(line(save_total_limit=limit))
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-9"][2 - limit :]


def test_two_runs_do_not_share_a_folder(crashed, line, capsys):
    """Workers may outlive a launcher that was killed: the next launch must not write beside them."""
    with FolderLock() as other, (crashed / "ledger.jsonl").open("a") as ledger:
        other.take(crashed)
        ledger.write('{"step": 9, ')  # the other run is in the middle of a line, which is not to be cut off
        ledger.flush()
        assert "another process is at work in it" in refused(line(resume_from_checkpoint="latest"), capsys)
        assert (crashed / "ledger.jsonl").read_text().endswith('{"step": 9, ')
    train_clm.main(line(resume_from_checkpoint="latest"))


def test_ranks_compare_their_adapters_before_the_first_step_and_every_few(line, monkeypatch):
    """What the comparison finds is tested in `test_ranks.py`; here, that a run makes it."""
    compared = []
    monkeypatch.setattr(Ranks, "require_equal", lambda _, parameters: compared.append(len(parameters)))
    train_clm.main(line(max_train_steps=11, checkpointing_steps=0))
    assert compared == [16, 16], "before steps 1 and 11: A and B of four layers in two blocks"


def test_the_command_resumes_with_the_budget_that_a_launch_out_of_memory_left(crashed, line, monkeypatch, capsys):
    budgets = []
    monkeypatch.setattr(
        causal_lm_run,
        "MicroBatches",
        lambda *args, **how: budgets.append(args[1].token_budget) or MicroBatches(*args, **how),
    )
    remember_budget(crashed, asked=192, fits=64)
    train_clm.main(line(resume_from_checkpoint="latest"))
    assert budgets == [64]
    assert "64; 192 did not fit in memory before" in capsys.readouterr().out
    assert report_of(crashed)["repeated_steps"] == 2


def test_another_token_budget_given_on_purpose_is_obeyed(crashed, line, monkeypatch, capsys):
    budgets = []
    monkeypatch.setattr(
        causal_lm_run,
        "MicroBatches",
        lambda *args, **how: budgets.append(args[1].token_budget) or MicroBatches(*args, **how),
    )
    remember_budget(crashed, asked=192, fits=64)
    train_clm.main(line(resume_from_checkpoint="latest", max_tokens_per_device=384))
    assert budgets == [384]
    assert "did not fit in memory before" not in capsys.readouterr().out


def test_a_dry_run_works_in_the_folder_of_a_run_that_another_process_continues(crashed, line, capsys):
    before = {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}
    with FolderLock() as at_work:
        at_work.take(crashed)
        train_clm.main(line(dry_run=True))
    assert "noise multiplier       0.8" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()} == before


def test_the_loser_of_a_race_for_a_new_folder_writes_nothing(line, tmp_path, monkeypatch, capsys):
    """Another launch takes the folder while this one loads its model."""
    out, other = tmp_path / "race", FolderLock()
    own = causal_lm_run.load_causal_lm

    def slow(job):
        other.make(out)
        (out / "run_config.json").write_text("the winner's")
        return own(job)

    monkeypatch.setattr(causal_lm_run, "load_causal_lm", slow)
    with other:
        assert "another process is at work in it" in refused(line(output_dir=out), capsys)
    assert {path.name for path in out.iterdir()} == {".lock", "run_config.json"}
    assert (out / "run_config.json").read_text() == "the winner's"


def test_the_default_delta_is_recorded_and_the_same_on_resume(line, tmp_path, capsys) -> None:
    short = {"delta": None, "max_train_steps": 2, "checkpointing_steps": 1}
    train_clm.main(line(**short))
    reason = "delta 0.001: a tenth of 1 / 64 examples, rounded down to a power of ten"
    assert reason in capsys.readouterr().out
    folder = tmp_path / "run"
    assert json.loads((folder / "run_config.json").read_text())["delta"] == 1e-3
    assert json.loads((folder / "publish" / "privacy_report.json").read_text())["delta"] == 1e-3
    again = short | {"resume_from_checkpoint": folder / "checkpoint-1", "out": tmp_path / "run"}
    train_clm.main(line(**again | {"delta": 1e-3}))
    assert "delta was 0.001 in the checkpoint and is 0.0001 now" in refused(line(**again | {"delta": 1e-4}), capsys)
