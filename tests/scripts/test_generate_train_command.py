"""The training jobs: the line that is printed, its noise, the budget, what is refused, and one job run to its end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from dptune._validate import InvalidArgument
from dptune.accounting import Cut, Spend, compose, epsilon
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.budget import Budget
from scripts import generate_train_command as job
from utils.cli.flags import parse
from utils.cli.launch_lines import PLAIN_CONFIG, SHARDED_CONFIG
from utils.files.jsonl import write_jsonl
from utils.training.arguments import CAUSAL_LM_GROUPS

ROOT = Path(__file__).resolve().parents[2]
ROWS = 200


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data; nothing is written into the repository."""
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"Tell me about {n}.", "answer": "No."} for n in range(ROWS)]
    write_jsonl(tmp_path / "data" / "chats.jsonl", rows)
    by_users = [row | ({"user": f"u{n % 50}"} if n else {}) for n, row in enumerate(rows)]
    write_jsonl(tmp_path / "data" / "by_users.jsonl", by_users)
    splits = {"train": datasets.Dataset.from_list(rows), "val": datasets.Dataset.from_list(rows[:9])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data" / "labelled_chats")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NEEDED = ["--dataset_name", "chats", "--model_name_or_path", "BASE", "--job_sess", "debug", "--target_epsilon", "5.94"]
SIZES = ["--total_bs", "40", "--per_device_train_batch_size", "4", "--num_train_epochs", "2"]


def line(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, list[str]]:
    """The comment and the words of the line that are printed."""
    job.main([*NEEDED, *SIZES, "--print_only", *argv])
    comment, *_, words = capsys.readouterr().out.splitlines()
    return comment, shlex.split(words)


def groups_of(words: list[str]) -> dict[str, object]:
    """What train_clm.py makes of the line."""
    filled = parse(*CAUSAL_LM_GROUPS, args=words[words.index(job.SCRIPT) + 1 :])
    return {name: value for group in filled for name, value in vars(group).items()}


def test_the_requirements_line_becomes_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    """Type A, as the users write it, but for a batch that the data set has."""
    older = "--dataset_name chats --model_name BASE --job_sess debug --eps 5.94 --total_bs 40 --perdevice_bs 4 "
    older += "--num_epochs 2 --gpus 1 --max_seq_len 1024 --prompt_style uncond_generation --lr 1e-3 --clip 0.5"
    job.main([*older.split(), "--no_eval_at_start", "--print_only"])
    by_older_names = capsys.readouterr().out
    style = ["--prompt_style", "uncond_generation", "--learning_rate", "1e-3", "--clip_norm", "0.5"]
    _, words = line(capsys, "--gpus", "1", "--block_size", "1024", *style, "--no_eval_at_start")
    assert by_older_names.splitlines()[-1] == shlex.join(words)
    assert words[:6] == ["accelerate", "launch", "--config_file", PLAIN_CONFIG, "--num_processes", "1"]
    given = groups_of(words)
    expected = {
        "train_file": ["data/chats.jsonl"],
        "model_name_or_path": "BASE",
        "output_dir": "outputs/debug",
        "prompt_style": "uncond_generation",
        "block_size": 1024,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 10,
        "num_train_epochs": 2.0,
        "learning_rate": 1e-3,
        "target_epsilon": 5.94,
        "clip_norm": 0.5,
        "delta": None,
        "eval_at_start": False,
        "resume_from_checkpoint": "latest",
    }
    assert {name: given[name] for name in expected} == expected


def test_the_noise_that_is_printed_costs_the_epsilon_that_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    comment, _ = line(capsys, "--noise_bands", "1")
    sigma, steps = float(comment.split("noise multiplier ")[1].split()[0]), 10
    assert f"{ROWS} examples and {steps} steps" in comment
    spent = epsilon(noise_multiplier=sigma, sampling_probability=40 / ROWS, steps=steps, delta=default_delta(ROWS))
    assert 5.90 < spent <= 5.94
    job.main([*NEEDED, *SIZES, "--noise_bands", "1", "--print_only"])
    assert f"# {delta_in_words(ROWS)}" in capsys.readouterr().out.splitlines()
    told, words = line(capsys, "--noise_bands", "1", "--delta", "5e-7")
    assert groups_of(words)["delta"] == 5e-7
    assert float(told.split("noise multiplier ")[1].split()[0]) > sigma


def test_eps_minus_one_is_no_privacy_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    comment, words = line(capsys, "--target_epsilon", "-1")
    assert comment == "# no privacy: the trained model may reveal any row of chats"
    given = groups_of(words)
    assert (given["clip_norm"], given["noise_multiplier"], given["target_epsilon"]) == (-1, -1, None)


@pytest.mark.parametrize(("flag", "value"), [("--delta", "5e-7"), ("--clip_norm", "2"), ("--noise_bands", "4")])
def test_a_setting_of_privacy_without_privacy_is_refused(flag: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{flag}=.*: is not read with --target_epsilon -1"):
        job.main([*NEEDED, *SIZES, "--target_epsilon", "-1", flag, value, "--print_only"])


def test_pairs_are_learned_from_a_labelled_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    comment, words = line(capsys, "--dataset_name", "labelled_chats", "--prompt_style", "vicuna")
    assert groups_of(words)["train_file"] == ["data/labelled_chats"]
    assert f"{ROWS} examples" in comment  # the training split's
    with pytest.raises(InvalidArgument, match="--dataset_name='chats': --prompt_style vicuna needs answers"):
        job.main([*NEEDED, *SIZES, "--prompt_style", "vicuna", "--print_only"])


def test_authors_are_counted_where_they_are_the_unit(capsys: pytest.CaptureFixture[str]) -> None:
    by_users = ["--dataset_name", "by_users"]
    comment, words = line(capsys, *by_users, "--privacy_unit", "user", "--examples_per_unit", "3")
    assert "51 authors" in comment  # the first row names nobody
    given = groups_of(words)
    assert (given["privacy_unit"], given["examples_per_unit"]) == ("user", 3)


def test_the_noise_of_example_level_sampling_hides_all_rows_of_an_author(capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--privacy_unit", "user", "--examples_per_unit", "3", "--user_level_method", "example-level"]
    comment, words = line(capsys, "--dataset_name", "by_users", *how)
    assert groups_of(words)["user_level_method"] == "example-level"
    kept = 50 * 3 + 1  # and the first row, which names nobody
    sigma, steps = float(comment.split("noise multiplier ")[1].split()[0]), 8
    assert f"{kept} examples and {steps} steps" in comment
    spend = Spend(sigma, 40 / kept, steps, group_size=3)
    assert 5.90 < compose([spend], delta=default_delta(kept)) <= 5.94


def test_users_that_nobody_thought_of_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidArgument, match="names users in user; give --privacy_unit user, or --ignore_users"):
        line(capsys, "--dataset_name", "by_users")
    comment, words = line(capsys, "--dataset_name", "by_users", "--ignore_users")
    assert f"{ROWS} examples" in comment
    assert groups_of(words)["ignore_users"] is True, "train_clm.py refuses such a file too"


def test_a_user_that_is_a_list_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(here / "data" / "lists.jsonl", [{"instruction": "a", "user": ["Jane Roe"]}] * ROWS)
    by_users = ["--privacy_unit", "user", "--examples_per_unit", "3"]
    with pytest.raises(InvalidArgument, match=r"row 1 .*user is neither text nor a number"):
        line(capsys, "--dataset_name", "lists", *by_users)


def test_several_gpus_share_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    _, words = line(capsys, "--gpus", "2", "--shard")
    assert words[2:6] == ["--config_file", SHARDED_CONFIG, "--num_processes", "2"]
    assert groups_of(words)["gradient_accumulation_steps"] == 5


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--target_epsilon", "0"], "^--target_epsilon=0.0"),
        (["--target_epsilon", "-2"], "^--target_epsilon=-2.0"),
        (["--total_bs", "42"], "^--total_bs=42: give a multiple of --per_device_train_batch_size x --gpus, 4"),
        (["--total_bs", "400"], "^--total_bs=400: chats has 200 examples"),
        (["--delta", "0.1"], "^--delta=0.1: must be below"),
        (["--noise_bands", "many"], "^--noise_bands='many': give a whole number of at least 1"),
        (["--", "--noise_bands", "4"], "^--noise_bands='after --': give --noise_bands before"),
        (["--ema", "1"], "^--ema=1.0: give a decay above 0 and below 1"),
        (["--ema", "0.9", "--average_last", "0.5"], "^--average_last=0.5: ema 0.9 already asks for an exponential"),
        (["--dataset_name", "nothing"], "^--dataset_name='nothing': no such file or folder in data"),
        (["--job_sess", "../up"], "^--job_sess='../up'"),
        (["--shard"], "^--shard=True"),
        (["--synthetic_data"], "^--synthetic_data=True: works only with --target_epsilon -1"),
        (["--privacy_unit", "user"], "^--examples_per_unit=None"),
        (["--privacy_unit", "user", "--examples_per_unit", "2"], "^--privacy_unit='user': no such column in chats"),
        (["--", "--user_level_method", "example-level"], "^--user_level_method='after --'"),
        (["--privacy_unit", "user", "--examples_per_unit", "2", "--ignore_users"], "^--ignore_users=True"),
        (["--", "--target-epsilon=3"], "^--target_epsilon='after --': give --target_epsilon before"),
        (["--", "--no_eval_at_start"], "^--no_eval_at_start='after --'"),
        (["--target_epsilon", "-1", "--", "--dry-run"], "^--dry_run='after --': give --print_only before"),
    ],
)
def test_mistakes_are_refused_by_name_and_enter_nothing(argv: list[str], expected: str, here: Path) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        job.main([*NEEDED, *SIZES, *argv])
    assert not (here / "outputs").exists()


def entered(*argv: str, extra: list[str] | None = None) -> Budget:
    (given,) = parse(job.JobArguments, args=[*NEEDED, *SIZES, *argv])
    job.enter_budget(given, extra or [])
    return Budget("outputs/debug/budget.jsonl")


def test_the_budget_knows_the_training_before_it_runs() -> None:
    stage = entered().stages[0]
    assert (stage.stage, stage.kind, stage.ledger) == ("generator debug", "training", "ledger.jsonl")
    assert len(entered().stages) == 1  # going on with the same job is no second training


def test_a_generator_without_privacy_or_with_a_fixed_key_voids_the_budget() -> None:
    assert "without privacy on chats" in entered("--target_epsilon", "-1").reasons[0]
    assert "fixed key" in entered(extra=["--insecure-test-seed=3"]).reasons[-1]


PAIRS = ["--dataset_name", "labelled_chats", "--prompt_style", "vicuna"]


def test_pairs_without_privacy_void_the_budget_unless_they_are_said_to_be_synthetic() -> None:
    assert entered(*PAIRS, "--target_epsilon", "-1", "--synthetic_data").stages == []
    assert entered(*PAIRS, "--target_epsilon", "-1").reasons == [
        "assistant debug: trained without privacy on labelled_chats"
    ]
    assert len(entered(*PAIRS, "--target_epsilon", "-1").stages) == 1  # nor does going on void it twice


def test_a_private_assistant_composes_with_the_generator_in_one_budget(here: Path) -> None:
    entered()
    entered(*PAIRS, "--job_sess", "assistant", "--budget_file", "outputs/debug/budget.jsonl")
    stages = Budget("outputs/debug/budget.jsonl").stages
    assert [stage.ledger for stage in stages] == ["ledger.jsonl", "../assistant/ledger.jsonl"]
    assert (here / "outputs" / "assistant" / "ledger.jsonl").read_bytes() == b""


def test_a_line_that_is_only_printed_says_that_it_is_not_entered(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.main([*NEEDED, *SIZES, "--print_only"])
    assert "# NOT entered in outputs/debug/budget.jsonl" in capsys.readouterr().out
    assert not (here / "outputs").exists()


def test_a_job_runs_to_its_report_and_its_budget(tiny_model_dir: Path, here: Path) -> None:
    for name in ("scripts", "accelerate_configs", "train_clm.py"):
        (here / name).symlink_to(ROOT / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = [
        *NEEDED,
        *SIZES,
        "--model_name_or_path",
        str(tiny_model_dir),
        "--block_size",
        "32",
        "--num_train_epochs",
        "0.4",
    ]
    line = [sys.executable, "-m", "scripts.generate_train_command", *argv]
    how = {"capture_output": True, "text": True, "timeout": 240, "check": False}
    done = subprocess.run(line, env={**environment, "PYTHONPATH": str(ROOT)}, **how)
    assert done.returncode == 0, done.stderr
    ledger = Path("outputs/debug/ledger.jsonl").read_bytes()
    again = subprocess.run(line, env={**environment, "PYTHONPATH": str(ROOT)}, **how)
    assert again.returncode == 0, again.stderr
    assert Path("outputs/debug/ledger.jsonl").read_bytes() == ledger  # nothing was spent twice
    report = json.loads(Path("outputs/debug/publish/privacy_report.json").read_text())
    spent = Budget("outputs/debug/budget.jsonl").epsilon(report["delta"])
    assert report["guarantee"] == "dp"
    assert spent == pytest.approx(report["epsilon"], rel=1e-9)
    assert spent <= 5.94


def test_cut_draws_reach_the_launch_and_the_noise_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    comment, words = line(capsys, "--max_batch", "48")
    assert groups_of(words)["max_batch"] == 48
    plain, _ = line(capsys)
    told = [float(text.split("noise multiplier ")[1].split()[0]) for text in (comment, plain)]
    spend = Spend(told[0], 40 / ROWS, 10, 1, Cut(48, ROWS))
    assert compose([spend], delta=default_delta(ROWS)) <= 5.94
    assert told[0] > told[1]
    with pytest.raises(InvalidArgument, match=r"^max_batch=39: most draws would be cut"):
        line(capsys, "--max_batch", "39")


@pytest.mark.parametrize(("given", "bands"), [("2", 2), ("4", 4), ("auto", 2), (None, 2)])
def test_correlated_noise_reaches_the_launch_and_the_noise_that_is_told(
    given: str | None, bands: int, capsys: pytest.CaptureFixture[str]
) -> None:
    comment, words = line(capsys, *([] if given is None else ["--noise_bands", given]))
    assert groups_of(words)["noise_bands"] == given
    assert f" with {bands} noise bands for {ROWS} examples and 10 steps" in comment
    sigma = float(comment.split("noise multiplier ")[1].split()[0])
    spend = Spend(sigma, 40 / ROWS, 10).with_bands(bands)
    assert 5.90 < compose([spend], delta=default_delta(ROWS)) <= 5.94
    plain, words = line(capsys, "--noise_bands", "1")
    assert groups_of(words)["noise_bands"] == "1"
    assert "noise bands" not in plain


@pytest.mark.parametrize(("name", "value"), [("ema", 0.95), ("average_last", 0.25)])
@pytest.mark.parametrize("epsilon", ["5.94", "-1"])
def test_an_average_reaches_the_launch(
    name: str, value: float, epsilon: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = line(capsys, "--target_epsilon", epsilon, f"--{name}", str(value))
    given = groups_of(words)
    assert {one: given[one] for one in ("ema", "average_last")} == {"ema": None, "average_last": None} | {name: value}
