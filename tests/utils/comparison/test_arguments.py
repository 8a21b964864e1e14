"""What is tried in each mode, what the trainer is told, and mistakes in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import compare_modes
from tests.comparison_runs import FLAGS, accuracy, compare
from tests.trainer_stand_in import TRAIN, VALIDATION, Trainer
from utils.classification.mode_defaults import ModelRates, default_learning_rate
from utils.cli.flags import exit_on_invalid_argument


def test_the_trainer_gets_what_was_asked_for(tmp_path: Path) -> None:
    epochs = "2.123456789"  # the plan's, and so its noise
    flags = [
        "--max_train_examples",
        "1000",
        "--data_dir",
        "d",
        "--seeds",
        "4",
        "--modes",
        "full",
        "--num_train_epochs",
        epochs,
    ]
    trainer = compare(tmp_path, *flags, "--target_epsilon", "3", "--", "--micro_batch_size", "7", "--lora_r", "2")
    shared = {
        "datasets": "sst2", "model_name_or_path": "m", "num_train_epochs": epochs, "batch_size": "100",
        "block_size": "128",
        "max_train_examples": "1000", "data_dir": "d", "seed": "4", "micro_batch_size": "7", "lora_r": "2",
        "finetune_mode": "full", "resume_from_checkpoint": "latest",
    }  # fmt: skip
    private = {"enable_dp": "", "target_epsilon": "3.0"}
    for command in trainer.commands:
        rest = {name: value for name, value in command.items() if name not in ("output_dir", "learning_rate")}
        assert rest == shared | (private if "enable_dp" in command else {})
    assert len({command["output_dir"] for command in trainer.commands}) == 4


def test_the_baseline_may_have_rates_of_its_own(tmp_path: Path) -> None:
    compare(tmp_path, "--baseline_learning_rates", "5e-5", "1e-4", "--modes", "full")
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert {line["learning_rate"] for line in lines if not line["private"]} == {5e-5, 1e-4}
    assert {line["learning_rate"] for line in lines if line["private"]} == {1e-4, 1e-3}


def test_without_rates_each_mode_is_tried_around_its_own(tmp_path: Path) -> None:
    trainer = Trainer(lambda *_: 0.8)
    words = ["--modes", "ia3", "lora", "--batch_size", "100", "--num_train_epochs", "2", "--model_name_or_path", "m"]
    compare_modes.main([*words, "--rate_factors", "1", "3", "--output_dir", str(tmp_path)], runner=trainer)
    ran = {(flags["finetune_mode"], "enable_dp" in flags, float(flags["learning_rate"])) for flags in trainer.commands}
    of_model = ModelRates(lambda: 0, lambda: 0)
    rates = {
        (mode, dp): default_learning_rate(mode, of_model, private=dp)
        for mode in ("ia3", "lora")
        for dp in (True, False)
    }
    assert ran == {(mode, dp, float(f"{rate * by:.4g}")) for (mode, dp), rate in rates.items() for by in (1, 3)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modes", "full", "half"], "--modes='half': give some of full, "),
        (["--learning_rates", "1e-3", "1e-3"], "--learning_rates='0.001 0.001': give at least one value, each only"),
        (["--rate_factors", "0"], "--rate_factors=0.0: give"),
        (["--baseline_learning_rates", "-1"], "--baseline_learning_rates=-1.0: give"),
        (["--learning_rates", "0"], "--learning_rates=0.0: give"),
        (["--clip_norm", "1", "1.0"], "--clip_norm='1.0 1.0': give at least one value, each only once"),
        (["--clip_norm", "0"], "--clip_norm=0.0: give"),
        (["--private_selection", "poisson", "--seeds", "1", "2"], "--seeds='1 2': a private selection uses one seed"),
        (["--private_selection", "poisson", "--validation_noise", "0"], "validation_noise=0.0: give"),
        (["--private_selection", "poisson", "--mean_trials", "0.5"], "mean_trials=0.5: give"),
        (["--private_selection", "poisson", "--batch_size", "2000"], "--batch_size=2000: there are 1000 training"),
        (["--private_selection", "poisson", "--delta", "0.01"], "--delta=0.01: must be below 1/num_examples"),
        (["--target_epsilon", "0"], "--target_epsilon=0.0: give"),
        (["--", "--noise_multiplier", "0.1"], "--noise_multiplier='after --': the comparison sets it"),
        (["--", "--target-epsilon=100"], "--target_epsilon='after --': the comparison sets it"),
        (["--", "--insecure_test_seed", "1"], "--insecure_test_seed='after --': the comparison sets it"),
        (["--", "--max-grad-norm=1"], "--max_grad_norm='after --': the comparison sets it"),
        (["--", "--clip_norm", "1"], "--clip_norm='after --': the comparison sets it"),
        (["--", "--max_batch", "300"], "--max_batch='after --': the comparison sets it"),
        (["--", "--noise_bands", "2"], "--noise_bands='after --': the comparison sets it"),
        (["--", "--num-epochs=9"], "--num_epochs='after --': the comparison sets it"),
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
