"""The comparison of modes and the private selection, with a stand-in for the trainings."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from dptune._validate import InvalidArgument
from dptune.accounting import Spend, compose, epsilon
from dptune.accounting.selection import DrawnTrial, PrivateSelection
from scripts import compare_modes
from tests.classifier_folders import save_bert, write_sst2
from tests.trainer_stand_in import MEASURED, TRAIN, VALIDATION, Ran, Trainer
from utils.classification.measured_defaults import measure_head_rate
from utils.classification.mode_defaults import default_learning_rate
from utils.cli.flags import exit_on_invalid_argument
from utils.comparison import selection as private_selection

MODES = ["--modes", "full", "lora", "last-layer"]
FLAGS = [*MODES, "--learning_rates", "1e-4", "1e-3", "--batch_size", "100", "--epochs", "2", "--model_checkpoint", "m"]
STEPS, Q = 20, 0.1


def accuracy(ran: Ran) -> float:
    """Private runs like the high rate, the others the low one; a later seed does a little better."""
    private = ran.clip_norm is not None
    good = ran.rate == (1e-3 if private else 1e-4)
    best = {"full": 0.9, "lora": 0.86, "last-layer": 0.7}[ran.mode]
    return best - 0.1 * private - 0.05 * (not good) + 0.01 * ran.seed


def compare(folder: Path, *flags: str, trainer: Trainer | None = None) -> Trainer:
    trainer = trainer or Trainer(accuracy)
    compare_modes.main([*FLAGS, "--output_dir", str(folder), *flags], runner=trainer)
    return trainer


def table(folder: Path) -> dict[str, list[str]]:
    """The rows of the first table by mode."""
    lines = (folder / "comparison.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if row[0] in ("full", "lora", "last-layer")}


def test_every_mode_rate_and_privacy_is_trained_and_the_best_rate_of_each_is_shown(tmp_path: Path) -> None:
    trainer = compare(tmp_path)
    ran = {(flags["finetune_mode"], flags["learning_rate"], "enable_dp" in flags) for flags in trainer.commands}
    assert len(trainer.commands) == len(ran) == 12
    assert table(tmp_path) == {
        "full": ["1,000,000", "0.001", "7", "0.800", "0.0001", "0.900", "+0.100", "0.510"],
        "lora": ["8,000", "0.001", "7", "0.760", "0.0001", "0.860", "+0.100", "0.510"],
        "last-layer": ["130", "0.001", "7", "0.600", "0.0001", "0.700", "+0.100", "0.510"],
    }
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert {(line["mode"], str(line["learning_rate"]), line["private"]) for line in lines} == ran
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_trainer_gets_what_was_asked_for(tmp_path: Path) -> None:
    epochs = "2.123456789"  # the plan's, and so its noise
    flags = ["--max_train_examples", "1000", "--data_dir", "d", "--seeds", "4", "--modes", "full", "--epochs", epochs]
    trainer = compare(tmp_path, *flags, "--target_epsilon", "3", "--", "--micro_batch_size", "7", "--lora_r", "2")
    shared = {
        "datasets": "sst2", "model_checkpoint": "m", "epochs": epochs, "batch_size": "100", "max_length": "128",
        "max_train_examples": "1000", "data_dir": "d", "seed": "4", "micro_batch_size": "7", "lora_r": "2",
        "finetune_mode": "full", "resume_from_checkpoint": "latest",
    }  # fmt: skip
    private = {"enable_dp": "", "target_epsilon": "3.0", "delta": "1e-06"}
    for command in trainer.commands:
        rest = {name: value for name, value in command.items() if name not in ("output_dir", "learning_rate")}
        assert rest == shared | (private if "enable_dp" in command else {})
    assert len({command["output_dir"] for command in trainer.commands}) == 4


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    stopped = Trainer(accuracy, stop_after=5)
    with pytest.raises(InvalidArgument, match=r"status 3: error: the machine went away \(all of it in .*\.log\)"):
        compare(tmp_path, trainer=stopped)
    assert not (tmp_path / "comparison.md").exists()
    second = compare(tmp_path)
    assert len(second.commands) == 7
    assert second.found == [True] + [False] * 6  # the trainer goes on with its own checkpoints, and ledger
    assert len(compare(tmp_path).commands) == 0
    assert len(compare(tmp_path, "--learning_rates", "1e-3", "1e-4", "1e-2").commands) == 6


@pytest.mark.parametrize("changed", [["--epochs", "3"], ["--target_epsilon", "2"], ["--", "--lora_r", "4"]])
def test_a_folder_of_other_settings_is_refused(tmp_path: Path, changed: list[str]) -> None:
    compare(tmp_path, "--modes", "lora")
    with pytest.raises(InvalidArgument, match=r"the trials in .* have .*; give that, or another --output_dir"):
        compare(tmp_path, "--modes", "lora", *changed)


def test_seeds_are_averaged_and_the_baseline_can_be_left_out(tmp_path: Path) -> None:
    trainer = compare(tmp_path, "--seeds", "0", "1", "2", "--no_baseline", "--modes", "lora")
    assert len(trainer.commands) == 6
    assert table(tmp_path) == {"lora": ["8,000", "0.001", "7", "0.770 ± 0.010 (3)", "-", "-", "-", "0.510"]}


def test_the_baseline_may_have_rates_of_its_own(tmp_path: Path) -> None:
    compare(tmp_path, "--baseline_learning_rates", "5e-5", "1e-4", "--modes", "full")
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert {line["learning_rate"] for line in lines if not line["private"]} == {5e-5, 1e-4}
    assert {line["learning_rate"] for line in lines if line["private"]} == {1e-4, 1e-3}


def test_without_rates_each_mode_is_tried_around_its_own(tmp_path: Path) -> None:
    trainer = Trainer(lambda *_: 0.8)
    words = ["--modes", "full", "lora", "--batch_size", "100", "--epochs", "2", "--model_checkpoint", "m"]
    compare_modes.main([*words, "--rate_factors", "1", "3", "--output_dir", str(tmp_path)], runner=trainer)
    ran = {(flags["finetune_mode"], "enable_dp" in flags, float(flags["learning_rate"])) for flags in trainer.commands}
    rates = {
        (mode, dp): default_learning_rate(mode, lambda: 0, private=dp)
        for mode in ("full", "lora")
        for dp in (True, False)
    }
    assert ran == {(mode, dp, float(f"{rate * by:.4g}")) for (mode, dp), rate in rates.items() for by in (1, 3)}


def test_a_head_alone_is_tried_around_what_its_checkpoint_measures(tmp_path: Path) -> None:
    checkpoint = save_bert(tmp_path / "bert")
    words = ["--modes", "last-layer", "--batch_size", "100", "--epochs", "2", "--model_checkpoint", str(checkpoint)]
    trainer = Trainer(lambda *_: 0.8)
    compare_modes.main([*words, "--rate_factors", "1", "3", "--output_dir", str(tmp_path / "out")], runner=trainer)
    rate = measure_head_rate(AutoModelForSequenceClassification.from_pretrained(checkpoint))
    assert [float(flags["learning_rate"]) for flags in trainer.commands] == pytest.approx([rate, 3 * rate] * 2)


def test_clip_norms_are_tried_in_private_runs_and_the_best_is_shown(tmp_path: Path) -> None:
    trainer = Trainer(lambda ran: 0.7 + 0.1 * (ran.clip_norm == 2) + 0.01 * (ran.rate == 1e-3))
    compare(tmp_path, "--modes", "lora", "--max_grad_norm", "0.5", "2", trainer=trainer)
    private = [flags for flags in trainer.commands if "enable_dp" in flags]
    assert {(flags["learning_rate"], flags["max_grad_norm"]) for flags in private} == {
        ("0.0001", "0.5"), ("0.0001", "2.0"), ("0.001", "0.5"), ("0.001", "2.0"),
    }  # fmt: skip
    assert len({flags["output_dir"] for flags in trainer.commands}) == len(trainer.commands) == 6
    assert all("max_grad_norm" not in flags for flags in trainer.commands if "enable_dp" not in flags)
    assert table(tmp_path) == {"lora": ["8,000", "0.001", "2", "0.810", "0.001", "0.710", "-0.100", "0.510"]}
    assert "the best of up to 4 on" in (tmp_path / "comparison.md").read_text()


def test_a_second_line_adds_its_trials_and_their_cost(tmp_path: Path) -> None:
    """First two modes with one seed, then one of them with three more at one rate."""
    compare(tmp_path, "--modes", "lora", "last-layer")
    trainer = compare(
        tmp_path, "--modes", "lora", "--learning_rates", "1e-4", "--seeds", "0", "1", "2", "--no_baseline"
    )
    assert len(trainer.commands) == 2
    assert table(tmp_path) == {  # the rate with most seeds, though the other scored higher with its one
        "lora": ["8,000", "0.0001", "7", "0.720 ± 0.010 (3)", "0.0001", "0.860", "+0.140", "0.510"],
        "last-layer": ["130", "0.001", "7", "0.600", "0.0001", "0.700", "+0.100", "0.510"],
    }
    text = (tmp_path / "comparison.md").read_text()
    assert "the best of one mode's runs (4, of lora)" in text
    assert "the best of all runs (6)" in text


def test_the_report_says_what_choosing_costs(tmp_path: Path) -> None:
    compare(tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    costs = [line.strip("| ").split("|") for line in text.split("### What choosing costs")[1].splitlines()]
    figures = {
        cells[0].strip(): float(cells[1]) for cells in costs if len(cells) == 2 and cells[1].strip()[0].isdigit()
    }
    spent = {m: compose([Spend(0.8, Q, m * STEPS)], delta=1e-6) for m in (1, 2, 6)}
    selection = PrivateSelection("poisson", 6, 5.0).epsilon(Spend(0.8, Q, STEPS), 1e-6)
    expected = {
        "one run, its settings fixed beforehand": spent[1],
        "the best of one mode's runs (2, of full)": spent[2],
        "the best of all runs (6), or anything else that was chosen by this table": spent[6],
        "one model by private selection, 6 trials on average, the same noise": selection,
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert value <= figures[name] <= value + 0.01
    assert "exact counts on validation records" in text


def test_steps_that_a_crash_repeated_are_counted(tmp_path: Path) -> None:
    compare(tmp_path, "--modes", "full", trainer=Trainer(accuracy, more_steps=5))
    cost = compose([Spend(0.8, Q, 2 * (STEPS + 5))], delta=1e-6)
    (shown,) = (
        line for line in (tmp_path / "comparison.md").read_text().splitlines() if "best of one mode's runs (2, " in line
    )
    assert cost <= float(shown.split("|")[2]) <= cost + 0.01


def best_of_all(folder: Path) -> tuple[str, float]:
    """(how many runs, their epsilon) in the report."""
    lines = (folder / "comparison.md").read_text().splitlines()
    (cells,) = (line.strip("| ").split("|") for line in lines if "the best of all runs" in line)
    return cells[0].partition("(")[2].partition(")")[0], float(cells[1])


def test_a_trial_that_did_not_end_is_counted(tmp_path: Path) -> None:
    """And of others only those that took a step."""
    compare(tmp_path, "--no_baseline", "--modes", "full", "lora")
    trials = tmp_path / "trials" / "sst2"
    (trials / "full_lr0.001_private_seed0" / "sst2" / "results.json").unlink()
    for name in ("lora_lr0.001_private_seed7", "last-layer_lr0.001_private_seed0"):
        (trials / name / "sst2").mkdir(parents=True)
    (trials / "lora_lr0.001_private_seed7" / "sst2" / "ledger.jsonl").write_text("")
    begun = json.dumps({"step": 1, "noise_multiplier": 0.5, "sampling_probability": Q})
    (trials / "last-layer_lr0.001_private_seed0" / "sst2" / "ledger.jsonl").write_text(f"{begun}\n")
    compare(tmp_path, "--no_baseline", "--modes", "lora")
    runs, spent = best_of_all(tmp_path)
    expected = compose([Spend(0.8, Q, 4 * STEPS), Spend(0.5, Q, 1)], delta=1e-6)
    assert runs == "3 and 2 unfinished"
    assert expected <= spent <= expected + 0.01
    runs = (tmp_path / "comparison.md").read_text().partition("one mode's runs (")[2].partition(")")[0]
    assert runs == "2, of lora"


def test_a_private_selection_in_the_same_folder_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(monkeypatch, (1, 0.0), (2, 0.0))
    told = "A private selection on the same records is in this folder too. What it costs adds to each of these: epsilon"
    with pytest.raises(InvalidArgument, match="a trial failed"):
        select(tmp_path, "--target_epsilon", "5", trainer=Trainer(accuracy, stop_after=1))
    for _ in range(2):  # first it is interrupted, then done
        compare(tmp_path, "--target_epsilon", "5")
        assert f"{told} 5.00 and delta 1e-06." in (tmp_path / "comparison.md").read_text()
        select(tmp_path, "--target_epsilon", "5")
    compare(tmp_path / "other")
    assert told not in (tmp_path / "other" / "comparison.md").read_text()


def test_a_ledger_that_lost_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"has 19 of 20 steps, so epsilon would be too small"):
        compare(tmp_path, trainer=Trainer(accuracy, more_steps=-1))


def test_runs_without_a_guarantee_have_no_cost(tmp_path: Path) -> None:
    compare(tmp_path, "--no_baseline", trainer=Trainer(accuracy, results={"epsilon": None}))
    text = (tmp_path / "comparison.md").read_text()
    assert "no guarantee (a fixed noise seed)" in text
    assert "| published |" not in text


# --- private selection


def select(folder: Path, *flags: str, trainer: Trainer | None = None, name: str = "geometric") -> Trainer:
    trainer = trainer or Trainer(accuracy)
    line = [*FLAGS, "--output_dir", str(folder), "--private_selection", name, "--mean_trials", "4", *flags]
    compare_modes.main(line, runner=trainer, sizes=lambda *_: (TRAIN, VALIDATION))
    return trainer


def draw(monkeypatch: pytest.MonkeyPatch, *trials: tuple[int, float]) -> None:
    """Let the next draws be these (candidate, noise)."""
    drawn = [DrawnTrial(*trial) for trial in trials]
    monkeypatch.setattr(PrivateSelection, "draw_trials", lambda *_: drawn)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_the_winner_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are full, lora and last-layer, each with 1e-4 and 1e-3; noise makes the second trial win."""
    draw(monkeypatch, (1, -20.0), (2, 30.0), (5, 0.0), (1, -10.0))
    trainer = select(tmp_path)
    assert [flags["finetune_mode"] for flags in trainer.commands] == ["full", "lora", "last-layer", "full"]
    assert all("enable_dp" in flags for flags in trainer.commands)
    selected = tmp_path / "selected" / "sst2"
    assert files_of(tmp_path) == {
        "settings.json", "selected/sst2/selection.json", "selected/sst2/README.md", "selected/sst2/model/weights",
    }  # fmt: skip
    assert (selected / "model" / "weights").read_text() == "lora 0.0001"
    content = json.loads((selected / "selection.json").read_text())
    assert content["winner"] == {"mode": "lora", "learning_rate": 1e-4, "clip_norm": MEASURED}
    assert content["noisy_accuracy"] == pytest.approx((round(0.71 * VALIDATION) + 30) / VALIDATION)
    card = (selected / "README.md").read_text()
    assert "| lora | 0.0001 | 7 | 0.860 |" in card
    assert "last-layer |" not in card


def test_a_release_is_on_the_disk_before_its_trials_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, (1, 0.0))
    synced, kept = set(), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    remove = shutil.rmtree

    def removing(folder: Path, **how: Any) -> None:
        released = tmp_path / "selected" / "sst2"
        if released.exists():
            kept.append({path.stat().st_ino for path in [released.parent, *released.rglob("*")]} <= synced)
        remove(folder, **how)

    monkeypatch.setattr(private_selection.shutil, "rmtree", removing)
    select(tmp_path)
    assert kept == [True]


def test_what_is_released_does_not_tell_how_many_trials_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, times = [], set()
    for number, losers in enumerate(([], [(4, -50.0)] * 7)):
        draw(monkeypatch, *losers, (1, 0.0))
        select(tmp_path / str(number))
        selected = tmp_path / str(number) / "selected" / "sst2"
        texts.append([(selected / name).read_text() for name in ("selection.json", "README.md")])
        times |= {path.stat().st_mtime for path in [selected, *selected.rglob("*")]}
    assert texts[0] == texts[1]
    assert len(times) == 1


@pytest.mark.parametrize("name", ["poisson", "geometric"])
def test_the_whole_costs_the_target_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    draw(monkeypatch, (1, 0.0))
    trainer = select(tmp_path, "--target_epsilon", "5", name=name)
    (flags,) = trainer.commands
    assert "target_epsilon" not in flags
    sigma = float(flags["noise_multiplier"])
    content = json.loads((tmp_path / "selected" / "sst2" / "selection.json").read_text())
    assert content["epsilon"] == PrivateSelection(name, 4, 5.0).epsilon(Spend(sigma, Q, STEPS), 1e-6)
    assert 4.99 < content["epsilon"] <= 5
    alone = epsilon(noise_multiplier=sigma, sampling_probability=Q, steps=STEPS, delta=1e-6)
    assert f"{alone:.4f} for one such run" in capsys.readouterr().out
    assert alone < 4.5


def test_the_trials_are_secret_and_an_interrupted_selection_keeps_its_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, (0, 0.0), (1, 0.0), (2, 0.0))
    with pytest.raises(InvalidArgument, match="a trial failed"):
        select(tmp_path, trainer=Trainer(accuracy, stop_after=1))
    secret = tmp_path / ".secret-sst2"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o700
    assert not (tmp_path / "selected").exists()
    draw(monkeypatch, (5, 0.0))
    with pytest.raises(InvalidArgument, match="a selection with 'geometric' is in this folder"):
        select(tmp_path, name="poisson")
    trainer = select(tmp_path)
    ran = [(flags["finetune_mode"], flags["learning_rate"]) for flags in trainer.commands]
    assert ran == [("full", "0.001"), ("lora", "0.0001")]
    assert trainer.found == [False, False]  # what the interrupted trial released was seen by nobody: it starts afresh
    assert not secret.exists()
    assert select(tmp_path).commands == []  # done
    with pytest.raises(InvalidArgument, match="mean_trials=9"):
        select(tmp_path, "--mean_trials", "9")
    with pytest.raises(InvalidArgument, match=r"^seed=3: a selection with 0 is in this folder"):
        select(tmp_path, "--seeds", "3")
    release = tmp_path / "selected" / "sst2" / "selection.json"
    content = json.loads(release.read_text())
    del content["seed"]  # as earlier selections left it
    release.write_text(json.dumps(content))
    assert select(tmp_path).commands == []


def test_a_trial_that_fails_does_not_tell_which_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for number in range(3):
        draw(monkeypatch, *[(0, 0.0)] * 3)
        with pytest.raises(InvalidArgument) as caught:
            select(tmp_path / "out", trainer=Trainer(accuracy, stop_after=number))
        errors.append(str(caught.value))
        shutil.rmtree(tmp_path / "out")
    secret = tmp_path / "out" / ".secret-sst2"
    assert set(errors) == {
        f"--private_selection='geometric': a trial failed; its log is in {secret}: publish nothing of it"
    }


def test_a_real_draw_is_a_selection(tmp_path: Path) -> None:
    trainer = select(tmp_path, "--mean_trials", "3", "--max_grad_norm", "0.5", "2")
    assert len(trainer.commands) >= 1
    content = json.loads((tmp_path / "selected" / "sst2" / "selection.json").read_text())
    assert len(content["candidates"]) == 12
    assert content["winner"] in content["candidates"]


def test_no_trial_is_an_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(monkeypatch)
    for _ in range(2):  # the second time it is still the outcome, whatever would be drawn
        assert select(tmp_path, name="poisson").commands == []
        assert "nothing is released, and the budget is spent all the same" in capsys.readouterr().out
        draw(monkeypatch, (1, 0.0))
    assert files_of(tmp_path / "selected" / "sst2") == {"selection.json", "README.md"}
    assert json.loads((tmp_path / "selected" / "sst2" / "selection.json").read_text())["winner"] is None


@pytest.mark.parametrize(
    "changed",
    [
        {"noise_factor": 0.9},
        {"more_steps": 1},
        {"results": {"private": False}},
        {"results": {"epsilon": None}},
    ],
)
def test_a_trial_that_was_not_accounted_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    draw(monkeypatch, (1, 0.0))
    with pytest.raises(InvalidArgument, match=r"which is what epsilon is computed from|a trial has no guarantee"):
        select(tmp_path, trainer=Trainer(accuracy, **changed))
    assert not (tmp_path / "selected").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modes", "full", "half"], "--modes='half': give some of full, "),
        (["--learning_rates", "1e-3", "1e-3"], "--learning_rates='0.001 0.001': give at least one, and none twice"),
        (["--rate_factors", "0"], "--rate_factors=0.0: give"),
        (["--baseline_learning_rates", "-1"], "--baseline_learning_rates=-1.0: give"),
        (["--learning_rates", "0"], "--learning_rates=0.0: give"),
        (["--max_grad_norm", "1", "1.0"], "--max_grad_norm='1.0 1.0': give at least one, and none twice"),
        (["--max_grad_norm", "0"], "--max_grad_norm=0.0: give"),
        (["--private_selection", "poisson", "--seeds", "1", "2"], "--seeds='1 2': a private selection takes one seed"),
        (["--private_selection", "poisson", "--validation_noise", "0"], "validation_noise=0.0: give"),
        (["--private_selection", "poisson", "--mean_trials", "0.5"], "mean_trials=0.5: give"),
        (["--private_selection", "poisson", "--batch_size", "2000"], "--batch_size=2000: must be at most the 1000"),
        (["--private_selection", "poisson", "--delta", "0.01"], "--delta=0.01: must be below 1/num_examples"),
        (["--target_epsilon", "0"], "--target_epsilon=0.0: give"),
        (["--", "--noise_multiplier", "0.1"], "--noise_multiplier='behind --': the comparison sets it"),
        (["--", "--target-epsilon=100"], "--target_epsilon='behind --': the comparison sets it"),
        (["--", "--insecure_test_seed", "1"], "--insecure_test_seed='behind --': the comparison sets it"),
        (["--mode", "full"], "unknown flag: --mode (did you mean --modes?)"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    line = [*FLAGS, "--output_dir", str(tmp_path), *flags]
    main = exit_on_invalid_argument()(compare_modes.main)
    with pytest.raises(SystemExit) as ended:
        main(line, runner=Trainer(accuracy), sizes=lambda *_: (TRAIN, VALIDATION))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_with_the_real_trainer(tmp_path: Path) -> None:
    """A private training and one without privacy, then a selection of exactly one trial: nothing is stood in for."""
    model, data = save_bert(tmp_path / "model"), write_sst2(tmp_path / "glue")
    flags = ["--model_checkpoint", str(model), "--data_dir", str(data), "--max_length", "16", "--modes", "lora"]
    flags += ["--learning_rates", "1e-2", "--batch_size", "40", "--epochs", "1", "--delta", "1e-3"]
    out = tmp_path / "out"
    compare_modes.main([*flags, "--output_dir", str(out), "--", "--checkpointing_steps", "0"])
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert [(line["mode"], line["private"]) for line in lines] == [("lora", True), ("lora", False)]
    assert all(0 <= line["scores"]["validation"]["accuracy"] <= 1 for line in lines)
    assert lines[0]["epsilon"] <= 8
    chosen = tmp_path / "chosen"
    select = ["--private_selection", "geometric", "--mean_trials", "1", "--output_dir", str(chosen)]
    compare_modes.main([*flags, *select, "--", "--checkpointing_steps", "0"])
    released = json.loads((chosen / "selected" / "sst2" / "selection.json").read_text())
    assert released["winner"]["mode"] == "lora"
    assert released["epsilon"] <= 8
    assert released["noise_multiplier"] > lines[0]["spends"][0]["noise_multiplier"]  # the selection is paid for
    assert not (chosen / ".secret-sst2").exists()
    AutoModelForSequenceClassification.from_pretrained(chosen / "selected" / "sst2" / "model")
