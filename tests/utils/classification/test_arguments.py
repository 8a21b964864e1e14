"""The flags of train_classifier.py: what they default to, what they mean together, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dptune import InvalidArgument
from utils.classification.arguments import CLASSIFIER_GROUPS, ONLY_PRIVATE, BudgetArguments, Settings
from utils.classification.mode_defaults import default_learning_rate
from utils.cli.flags import parse
from utils.training.selection import HeldOutSelection


def settings(*flags: str, datasets: tuple[str, ...] = ("--datasets", "sst2")) -> Settings:
    return Settings(*parse(*CLASSIFIER_GROUPS, args=[*datasets, *flags]))


MEASURED = 0.0625


def rates(*flags: str) -> tuple[float, float | None]:
    """(of what is below the head, of the head), with a head that measures MEASURED."""
    updates = settings(*flags).updates(lambda: MEASURED)
    return updates.learning_rate, updates.head_learning_rate


def not_measured() -> float:
    raise AssertionError("the mode has a rate of its own")


def test_the_defaults() -> None:
    given = settings()
    assert given.checkpoint.model_name_or_path == "prajjwal1/bert-tiny"
    assert given.checkpoint.block_size == 128
    assert (given.mode.finetune_mode, given.mode.num_prepend_tokens) == ("full", 20)
    assert (given.mode.lora_r, given.mode.lora_alpha, given.mode.lora_dropout) == (16, 16.0, 0.0)
    assert (given.steps.num_train_epochs, given.steps.batch_size, given.steps.micro_batch_size) == (3.0, 256, 32)
    assert given.budget.delta is None
    assert given.budget.settings() is None
    assert given.token_budget == 32 * 128


def test_the_lines_of_the_readme() -> None:
    given = settings("--finetune_mode", "full")
    assert given.folder == Path("outputs/classifier-full")
    line = "--finetune_mode ia3 --enable_dp --target_epsilon 8.0 --clip_norm 0.1"
    given = settings(*line.split(), datasets=("--datasets", "qnli", "qqp"))
    assert given.data.datasets == ["qnli", "qqp"]
    older = line.replace("clip_norm", "max_grad_norm") + " --epochs 2 --max_length 64 --model_checkpoint m"
    given = settings(*older.split(), datasets=("--datasets", "qnli", "qqp"))
    assert (given.steps.num_train_epochs, given.checkpoint.block_size) == (2.0, 64)
    assert given.checkpoint.model_name_or_path == "m"
    assert given.folder == Path("outputs/classifier-ia3-dp")
    engine = given.budget.settings()
    assert engine is not None
    assert (engine.target_epsilon, engine.noise_multiplier, engine.clip_norm, engine.delta) == (8.0, None, 0.1, None)


def test_privacy_defaults_to_epsilon_8() -> None:
    engine = settings("--enable_dp", "--clip_norm", "2").budget.settings()
    assert engine is not None
    assert (engine.target_epsilon, engine.noise_multiplier, engine.clip_norm) == (8.0, None, 2.0)
    engine = settings("--enable_dp", "--clip_norm", "2", "--noise_multiplier", "1.5").budget.settings()
    assert engine is not None
    assert (engine.target_epsilon, engine.noise_multiplier) == (None, 1.5)


READ_WITHOUT_PRIVACY = {"enable_dp", "clip_norm", "ignore_users", "insecure_test_seed", "max_batch"}


@pytest.mark.parametrize("name", [one.name for one in fields(BudgetArguments)])
def test_each_flag_of_privacy_is_read_without_privacy_or_refused(name: str) -> None:
    given = settings()
    assert given.budget.settings() is None
    assert (name in ONLY_PRIVATE) != (name in READ_WITHOUT_PRIVACY)
    if name in READ_WITHOUT_PRIVACY:
        given.refuse_unread({name})
    else:
        with pytest.raises(InvalidArgument, match=f"^--{name}=.*: is not read without --enable_dp"):
            given.refuse_unread({name, "num_train_epochs"})
    settings("--enable_dp").refuse_unread({name})


def test_a_clip_norm_is_to_be_measured_only_where_a_private_run_was_given_none() -> None:
    assert settings("--enable_dp").budget.clip_norm_is_open
    assert not settings("--enable_dp", "--clip_norm", "2").budget.clip_norm_is_open
    assert not settings().budget.clip_norm_is_open


def test_without_privacy_a_step_is_clipped_as_the_trainer_does() -> None:
    assert settings().budget.plain_max_grad_norm == 1
    assert settings("--clip_norm", "2").budget.plain_max_grad_norm == 2
    assert settings("--clip_norm", "2", "--enable_dp").budget.plain_max_grad_norm is None


def test_the_learning_rate_is_the_modes_own_unless_given() -> None:
    for private in (True, False):
        flags = ["--finetune_mode", "lora", *(["--enable_dp"] if private else [])]
        assert rates(*flags)[0] == default_learning_rate("lora", not_measured, private=private)
        assert rates(*flags, "--learning_rate", "0.3")[0] == 0.3


LORA, HEAD_ALONE, WHOLE = (["--finetune_mode", mode] for mode in ("lora", "last-layer", "full"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--learning_rate", "0.3"], (0.3, 0.3)),
        ([*LORA, "--learning_rate", "0.003"], (0.003, 0.003)),
        ([*LORA, "--learning_rate", "0.003", "--enable_dp"], (0.003, MEASURED)),
        ([*LORA, "--learning_rate", "0.003", "--enable_dp", "--head_learning_rate", "0.2"], (0.003, 0.2)),
        ([*WHOLE, "--learning_rate", "0.003", "--enable_dp"], (0.003, 0.003)),
        ([*LORA, "--learning_rate", "0.003", "--enable_dp", "--optimizer", "sgd"], (0.003, 0.003)),
        ([*HEAD_ALONE], (MEASURED, MEASURED)),
        ([*HEAD_ALONE, "--enable_dp"], (MEASURED, MEASURED)),
        ([*HEAD_ALONE, "--enable_dp", "--learning_rate", "0.003"], (0.003, 0.003)),
    ],
)
def test_the_head_learns_as_its_inputs_allow_where_noise_would_drown_what_is_below(
    flags: list[str], expected: tuple[float, float]
) -> None:
    assert rates(*flags) == expected


def test_virtual_tokens_count_in_what_fits() -> None:
    given = settings("--finetune_mode", "prefix+lora", "--num_prepend_tokens", "10", "--block_size", "30")
    assert (given.virtual_tokens, given.token_budget) == (10, 32 * 40)


def test_what_a_mode_does_not_use_is_not_judged() -> None:
    given = settings("--finetune_mode", "last-layer", "--num_prepend_tokens", "0", "--lora_r", "0")
    assert given.virtual_tokens == 0


def test_labels_are_in_the_column_label_unless_another_is_named() -> None:
    own = ("--train_file", "x", "--text_columns", "t")
    assert settings(datasets=own).data.labels_in == "label"
    assert settings("--label_column", "mood", datasets=own).data.labels_in == "mood"


def test_outputs_may_go_elsewhere() -> None:
    given = settings("--output_dir", "x", "--checkpointing_steps", "0", "--resume_from_checkpoint", "latest")
    assert given.folder == Path("x")
    output = given.results.of_task(Path("x/sst2"))
    assert (output.output_dir, output.checkpointing_steps, output.resume_from_checkpoint) == ("x/sst2", 0, "latest")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train_file", "x.csv", "--text_columns", "text"), "--datasets='sst2': give either this or"),
        (("--target_epsilon", "0"), "--target_epsilon=0.0: give a finite number above 0"),
        (("--target_epsilon", "1", "--noise_multiplier", "1"), "--target_epsilon=1.0: give --target_epsilon or --noi"),
        (("--noise_multiplier", "-1"), "--noise_multiplier=-1.0: give a finite number above 0"),
        (("--clip_norm", "-1"), "--clip_norm=-1.0: give a finite number above 0"),
        (("--delta", "1"), "--delta=1.0: give a number above 0 and below 1"),
        (("--batch_size", "0"), "--batch_size=0: give a whole number"),
        (("--micro_batch_size", "0"), "--micro_batch_size=0: give a whole number"),
        (("--num_train_epochs", "0"), "--num_train_epochs=0.0: give a finite number above 0"),
        (("--learning_rate", "0"), "--learning_rate=0.0: give a finite number above 0"),
        (("--head_learning_rate", "-1"), "--head_learning_rate=-1.0: give a finite number above 0"),
        (("--block_size", "1"), "--block_size=1: give a whole number of at least 2"),
        (
            ("--finetune_mode", "prefix+lora", "--num_prepend_tokens", "0"),
            "--num_prepend_tokens=0: give a whole number",
        ),
        (("--finetune_mode", "prefix+lora", "--lora_r", "0"), "--lora_r=0: give a whole number"),
        (("--prefix_projection",), "--prefix_projection=True: needs a prefix mode, not --finetune_mode full"),
        (("--label_column", "label"), "--label_column='label': works only with --train_file"),
        (("--optimizer", "sgd"), "--learning_rate=None: --optimizer sgd needs it"),
        (("--text_columns", "text"), r"--text_columns=\['text'\]: works only with --train_file"),
        (("--eval_freq", "0"), "--eval_freq=0: give a whole number"),
        (("--max_train_examples", "0"), "--max_train_examples=0: give a whole number"),
        (("--weight_decay", "-1"), "--weight_decay=-1.0: give a number of at least 0"),
        (("--ema", "1"), "--ema=1.0: give a decay above 0 and below 1"),
        (("--ema", "0.9", "--average_last", "0.5"), "--average_last=0.5: the average is exponential"),
        (("--weight_decay", "nan"), "--weight_decay=nan: give a number of at least 0"),
        (("--seed", "-1"), "--seed=-1: give a whole number of at least 0"),
        (("--seed", "4294967296"), "--seed=4294967296: give a whole number of at least 0 and below"),
    ],
)
def test_a_mistake_names_the_flag(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--datasets=None: give either this or --train_file"),
        (("--datasets", "sst2", "sst2"), "--datasets='sst2 sst2': names a task twice"),
        (("--train_file", "x.csv"), "--text_columns=None: --train_file needs it"),
        (("--train_file", "x", "--text_columns", "t", "--data_dir", "d"), "--data_dir='d': works only with --datasets"),
        (("--train_file", "x", "--text_columns", "label"), "--label_column='label': is one of --text_columns"),
        (("--train_file", "x", "--text_columns", "t", "--class_names", "a"), "--class_names='a': give two or more"),
        (("--train_file", "x", "--text_columns", "t", "--class_names", "a", "a"), "--class_names='a a': give two"),
        (("--train_file", "x", "--text_columns", "t", "--class_names", "a", " b"), "--class_names='a  b': give two"),
        (("--datasets", "sst2", "--class_names", "a", "b"), r"--class_names=\['a', 'b'\]: works only with --train"),
    ],
)
def test_mistakes_about_the_data(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings(*flags, datasets=())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        settings("--finetune_mode", "dora")
    assert ended.value.code == 2


def test_the_new_flags_reach_the_run() -> None:
    given = settings("--warmup_ratio", "0.1", "--early_stopping_patience", "2", "--load_best_model_at_end")
    assert given.updates(lambda: 1.0).warmup_ratio == 0.1
    assert given.results.of_task(Path("out")).selection == HeldOutSelection(patience=2, keep_best=True)
    assert settings("--use_rslora").mode.use_rslora
    with pytest.raises(InvalidArgument, match=r"^--validation_is_public=True: is read only with"):
        settings("--validation_is_public")
    with pytest.raises(InvalidArgument, match=r"^--warmup_ratio=2\.0: "):
        settings("--warmup_ratio", "2")
