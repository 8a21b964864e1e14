"""A run's folder tells its mechanism: style, noise, unit, and what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.audit.games import Mechanism
from dptune.audit.settings import Audited, count_noise_of, settings_of_run, style_named, style_of
from dptune.clipping_styles import FLAT, Adaptive, Automatic, Clipping, PerLayer, clipping_in_words
from dptune.report.statement import REPORT_NAME, PrivacyStatement, write_privacy_report
from dptune.units.unit import PrivacyUnit
from tests.dptune.report.test_statement import not_private, private


def run_with(folder: Path, statement: PrivacyStatement, weights: str = "adapter_model.safetensors") -> Path:
    publish = folder / "publish"
    (publish / weights).parent.mkdir(parents=True)
    (publish / weights).write_text("weights")
    write_privacy_report(publish / REPORT_NAME, statement)
    return folder


@pytest.mark.parametrize(
    ("weights", "trained"),
    [
        ("adapter_model.safetensors", "lora"),
        ("adapter/adapter_model.safetensors", "lora"),
        ("model.safetensors", "whole"),
    ],
)
def test_a_run_is_read(weights: str, trained: str, tmp_path: Path) -> None:
    statement = private(unused_steps=5)
    found = settings_of_run(run_with(tmp_path, statement, weights), ranks=2)
    mechanism = Mechanism(
        noise_multiplier=statement.noise_multiplier or 0, clip_norm=statement.clip_norm or 0, trained=trained, ranks=2
    )
    steps = statement.steps + 5
    wanted = Audited(mechanism, statement.sampling_probability, statement.delta or 0, steps, statement.epsilon)
    assert found == wanted
    assert settings_of_run(tmp_path / "publish", ranks=2) == wanted


def test_of_a_run_with_noise_bands_the_turns_are_read(tmp_path: Path) -> None:
    statement = private(noise_bands=2, unused_steps=5)
    found = settings_of_run(run_with(tmp_path, statement), ranks=1)
    turns = -(-(statement.steps + 5) // 2)
    assert (found.sampling_probability, found.steps) == (2 * statement.sampling_probability, turns)


@pytest.mark.parametrize(
    ("unit", "rows_per_unit", "group_size"),
    [
        (PrivacyUnit("author", "user-level", 3), 3, 1),
        (PrivacyUnit("author", "example-level", 3), 1, 3),
        (PrivacyUnit(views=4), 4, 1),
        (PrivacyUnit("author", "user-level", 3, views=4), 12, 1),
    ],
    ids=["user-level", "example-level", "views", "user-level, views"],
)
def test_the_rows_that_are_clipped_as_one_are_read(
    unit: PrivacyUnit, rows_per_unit: int, group_size: int, tmp_path: Path
) -> None:
    statement = private(method=unit.how, sampled=unit.sampled, group_size=unit.group_size)
    mechanism = settings_of_run(run_with(tmp_path, statement), ranks=1).mechanism
    assert (mechanism.rows_per_unit, mechanism.group_size) == (rows_per_unit, group_size)


@pytest.mark.parametrize(
    "style",
    [
        FLAT,
        PerLayer(),
        PerLayer({"a": 3.0, "b": 4.0}),
        Automatic(0.25),
        Automatic(1e-7),
        Adaptive(0.75, count_noise=9.0),
    ],
    ids=repr,
)
def test_a_style_is_read_from_its_words(style: Clipping) -> None:
    found = style_of(clipping_in_words(style), 9.0)
    assert found == (PerLayer() if isinstance(style, PerLayer) else style)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="words='round': is no clipping style that this version knows"):
        style_of("round", 9.0)


def test_styles_have_names() -> None:
    named: list[Any] = [style_named(name, 2.0) for name in ("flat", "per-layer", "automatic", "adaptive")]
    assert named == [FLAT, PerLayer(), Automatic(), Adaptive(count_noise=20.0)]
    with pytest.raises(InvalidArgument, match="name='round': is no clipping style; give one of flat, per-layer"):
        style_named("round", 2.0)


def test_the_noise_of_a_count_fits_sigma() -> None:
    assert count_noise_of(100, 2.0) == 5
    assert count_noise_of(10, 2.0) == 20


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"path='{tmp_path}': holds no privacy_report.json; give the folder"):
        settings_of_run(tmp_path, ranks=1)
    run_with(tmp_path, not_private())
    with pytest.raises(InvalidArgument, match="states no guarantee to audit"):
        settings_of_run(tmp_path, ranks=1)
    with pytest.raises(InvalidArgument, match="clip_norm=1e-15: give a number from"):
        settings_of_run(run_with(tmp_path / "tiny", private(clip_norm=1e-15)), ranks=1)
