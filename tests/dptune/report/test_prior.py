"""An earlier release keeps the guarantee that its own report states, and the bounds of several add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.report.prior import PriorRelease, read_priors, together
from dptune.report.statement import REPORT_NAME, write_privacy_report
from tests.dptune.report.test_statement import not_private, private

UNIT = "one training example"
EARLIER = PriorRelease(name="a", sha256="1", epsilon=2.0, delta=1e-6, privacy_unit=UNIT, declared_public=False)


def read(folder: Path, **how: Any) -> tuple[PriorRelease, ...]:
    return read_priors(folder, REPORT_NAME, **{"name": "b", "sha256": "2", "declared_public": False} | how)


@pytest.mark.parametrize("place", [".", "publish"])
def test_the_guarantee_is_that_of_the_report_beside_it(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    write_privacy_report(tmp_path / place / REPORT_NAME, private())
    (found,) = read(tmp_path)
    assert (found.epsilon, found.delta, found.privacy_unit) == (2.25712345, 1e-7, UNIT)
    assert (found.name, found.sha256, found.declared_public) == ("b", "2", False)


def test_a_start_of_a_start_is_kept(tmp_path: Path) -> None:
    write_privacy_report(tmp_path / REPORT_NAME, private(starts_from=(EARLIER,)))
    assert read(tmp_path)[1:] == (EARLIER,)


@pytest.mark.parametrize("reported", [False, True])
def test_without_a_guarantee_there_is_no_bound(tmp_path: Path, reported: bool) -> None:
    if reported:
        write_privacy_report(tmp_path / REPORT_NAME, not_private())
    (found,) = read(tmp_path, declared_public=True)
    assert (found.epsilon, found.delta, found.privacy_unit, found.declared_public) == (None, None, None, True)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"guarantee": "perhaps"}',
        '{"guarantee": "dp", "epsilon": "2", "delta": 0.1, "privacy_unit": "x"}',
        json.dumps({"guarantee": "none", "starts_from": [{"name": "a"}]}),
    ],
)
def test_a_damaged_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / REPORT_NAME).write_text(content)
    with pytest.raises(InvalidArgument, match=f"{REPORT_NAME}': is no readable privacy report; restore it"):
        read(tmp_path)


def test_bounds_for_the_same_unit_add_up() -> None:
    public = replace(EARLIER, epsilon=None, delta=None, privacy_unit=None)
    assert together(1.0, 1e-5, UNIT, (EARLIER, EARLIER, public)) == pytest.approx((5.0, 1.2e-5))
    assert together(1.0, 1e-5, UNIT, (public,)) is None
    assert together(1.0, 1e-5, "one author", (EARLIER,)) is None
