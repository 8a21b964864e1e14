"""All flags of train_classifier.py: what they default to, and what those of several groups mean together."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dptune import InvalidArgument
from tests.classifier_settings import settings
from utils.classification.arguments import ONLY_PRIVATE
from utils.classification.budget_arguments import BudgetArguments
from utils.classification.mode_defaults import ModelRates, default_learning_rate
from utils.training.selection import HeldOutSelection

MEASURED, WHOLE_MODEL = 0.0625, 0.125
OF_MODEL = ModelRates(lambda: MEASURED, lambda: WHOLE_MODEL)


def rates(*flags: str) -> tuple[float, float | None]:
    """(of what is below the head, of the head)."""
    known = [] if "--optimizer" in flags else ["--optimizer", "adamw"]
    updates = settings(*flags, *known).updates(OF_MODEL)
    return updates.learning_rate, updates.head_learning_rate


def test_the_defaults() -> None:
    given = settings()
    assert given.checkpoint.model_name_or_path == "prajjwal1/bert-tiny"
    assert given.checkpoint.block_size == 128
    assert (given.mode.finetune_mode, given.mode.num_prepend_tokens) == ("full", 20)
    assert (given.mode.lora_r, given.mode.lora_alpha, given.mode.lora_dropout) == (16, 16.0, 0.0)
    assert (given.steps.num_train_epochs, given.steps.batch_size, given.steps.micro_batch_size) == (3.0, 256, 32)
    assert given.budget.delta is None
    assert given.budget.settings(trained=1) is None
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
    engine = given.budget.settings(trained=1)
    assert engine is not None
    assert (engine.target_epsilon, engine.noise_multiplier, engine.clip_norm, engine.delta) == (8.0, None, 0.1, None)


READ_WITHOUT_PRIVACY = {"enable_dp", "clip_norm", "ignore_users", "insecure_test_seed", "max_batch"}


@pytest.mark.parametrize("name", [one.name for one in fields(BudgetArguments)])
def test_each_flag_of_privacy_is_read_without_privacy_or_refused(name: str) -> None:
    given = settings()
    assert given.budget.settings(trained=1) is None
    assert (name in ONLY_PRIVATE) != (name in READ_WITHOUT_PRIVACY)
    if name in READ_WITHOUT_PRIVACY:
        given.refuse_unread({name})
    else:
        with pytest.raises(InvalidArgument, match=f"^--{name}=.*: is not read without --enable_dp"):
            given.refuse_unread({name, "num_train_epochs"})
    settings("--enable_dp").refuse_unread({name})


def test_the_learning_rate_is_the_modes_own_unless_given() -> None:
    for private in (True, False):
        flags = ["--finetune_mode", "lora", *(["--enable_dp"] if private else [])]
        own = default_learning_rate("lora", OF_MODEL, private=private)
        assert rates(*flags)[0] == own < MEASURED
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
        ([*WHOLE, "--enable_dp"], (WHOLE_MODEL, WHOLE_MODEL)),
        ([*WHOLE], (WHOLE_MODEL, WHOLE_MODEL)),
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


def test_the_new_flags_reach_the_run() -> None:
    given = settings(
        "--optimizer", "adamw", "--warmup_ratio", "0.1", "--early_stopping_patience", "2", "--load_best_model_at_end"
    )
    assert given.updates(OF_MODEL).warmup_ratio == 0.1
    assert given.results.of_task(Path("out")).selection == HeldOutSelection(patience=2, keep_best=True)
    assert settings("--use_rslora").mode.use_rslora
    with pytest.raises(InvalidArgument, match=r"^--validation_is_public=True: is read only with"):
        settings("--validation_is_public")
    with pytest.raises(InvalidArgument, match=r"^--warmup_ratio=2\.0: "):
        settings("--warmup_ratio", "2")
