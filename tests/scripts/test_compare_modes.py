"""The comparison of modes and the private selection, with a stand-in for the trainings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

import train_classifier
from dptune._validate import InvalidArgument
from dptune.accounting import Spend, epsilon
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.accounting.selection import PrivateSelection
from scripts import compare_modes
from tests.classifier_folders import save_bert, write_sst2
from tests.comparison_runs import STEPS, Q, accuracy, compare, draw, files_of, select
from tests.trainer_stand_in import TRAIN, Trainer
from utils.classification.measured_defaults import measure_head_rate


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    stopped = Trainer(accuracy, stop_after=5)
    with pytest.raises(InvalidArgument, match=r"status 3: error: the machine went away \(full log: .*\.log\)"):
        compare(tmp_path, trainer=stopped)
    assert not (tmp_path / "comparison.md").exists()
    second = compare(tmp_path)
    assert len(second.commands) == 7
    assert second.found == [True] + [False] * 6  # the trainer goes on with its own checkpoints, and ledger
    assert len(compare(tmp_path).commands) == 0
    assert len(compare(tmp_path, "--learning_rates", "1e-3", "1e-4", "1e-2").commands) == 6


def test_a_head_alone_is_tried_around_what_its_checkpoint_measures(tmp_path: Path) -> None:
    checkpoint = save_bert(tmp_path / "bert")
    words = [
        "--modes",
        "last-layer",
        "--batch_size",
        "100",
        "--num_train_epochs",
        "2",
        "--model_name_or_path",
        str(checkpoint),
    ]
    trainer = Trainer(lambda *_: 0.8)
    compare_modes.main([*words, "--rate_factors", "1", "3", "--output_dir", str(tmp_path / "out")], runner=trainer)
    rate = measure_head_rate(AutoModelForSequenceClassification.from_pretrained(checkpoint))
    assert [float(flags["learning_rate"]) for flags in trainer.commands] == pytest.approx([rate, 3 * rate] * 2)


@pytest.mark.parametrize(("flag", "value"), [("--validation_noise", "20"), ("--mean_trials", "10")])
def test_a_setting_of_a_private_selection_is_refused_without_one(tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{flag}=.*: is not read without --private_selection"):
        compare_modes.main(["--output_dir", str(tmp_path / "out"), flag, value])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("private", [True, False])
def test_a_second_program_in_the_folder_is_refused_before_it_draws_or_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    """It begins while the first program's first trial runs."""
    draw(monkeypatch, (1, 0.0))
    begin = select if private else compare
    second = Trainer(accuracy)

    class First(Trainer):
        def __call__(self, command: Sequence[str], log: Path) -> int:
            before = files_of(tmp_path)
            draw(monkeypatch, (3, 0.0), (5, 0.0))
            with pytest.raises(InvalidArgument, match="another process is at work in it"):
                begin(tmp_path, trainer=second)
            assert files_of(tmp_path) == before
            return super().__call__(command, log)

    begin(tmp_path, trainer=First(accuracy))
    assert second.commands == []
    if private:
        content = json.loads((tmp_path / "selected" / "sst2" / "selection.json").read_text())
        assert content["winner"]["learning_rate"] == 1e-3


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
    assert content["epsilon"] == PrivateSelection(name, 4, 5.0).epsilon(Spend(sigma, Q, STEPS), default_delta(TRAIN))
    assert 4.99 < content["epsilon"] <= 5
    alone = epsilon(noise_multiplier=sigma, sampling_probability=Q, steps=STEPS, delta=default_delta(TRAIN))
    said = capsys.readouterr().out
    assert delta_in_words(TRAIN) in said
    costs = ((content["epsilon"], "for the selection"), (alone, "for one such run"), (5, "for the whole selection"))
    for value, words in costs:
        (shown,) = re.findall(rf"(\d+\.\d{{4}}) {words}", said)
        assert min(value, content["epsilon"]) <= float(shown) <= value + 1e-4  # a bound is never rounded down
    assert alone < 4.5


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
        f"--private_selection='geometric': a trial failed; read its log in {secret}, and do not publish the log"
    }


def train_here(command: Sequence[str], _: Path) -> int:
    """A `Runner` that saves the start of a process."""
    train_classifier.main(command[2:])
    return 0


def test_with_the_real_trainer(tmp_path: Path) -> None:
    """A private training and one without privacy, in this process, then a selection of exactly one trial, launched."""
    model, data = save_bert(tmp_path / "model"), write_sst2(tmp_path / "glue")
    flags = ["--model_name_or_path", str(model), "--data_dir", str(data), "--block_size", "16", "--modes", "lora"]
    flags += ["--learning_rates", "1e-2", "--batch_size", "40", "--num_train_epochs", "1", "--delta", "1e-3"]
    out = tmp_path / "out"
    compare_modes.main([*flags, "--output_dir", str(out), "--", "--checkpointing_steps", "0"], runner=train_here)
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
    AutoModelForSequenceClassification.from_pretrained(chosen / "selected" / "sst2")
