"""Every change of a published folder is refused for its own reason, and the folder as it is passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tampering
from tests.dptune.report.test_check import private_run

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("change", tampering.CHANGES, ids=lambda change: change.name)
def test_a_change_is_refused_and_the_run_stays_as_it_was(change: tampering.Change, published: Path) -> None:
    before = {path.name: path.read_bytes() for path in published.iterdir()}
    line = tampering.tamper(published, change)
    assert line is not None
    assert "\n" not in line
    assert {path.name: path.read_bytes() for path in published.iterdir()} == before


def test_a_reason_is_not_the_checksum_where_that_was_written_anew(published: Path) -> None:
    lines = {change.name: tampering.tamper(published, change) or "" for change in tampering.CHANGES if change.sums}
    assert len(lines) > 20
    assert [name for name, line in lines.items() if "SHA256SUMS" in line] == []


def test_a_change_that_nobody_could_find_is_told(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tampering, "CHANGES", [tampering.Change("nothing", lambda _: None)])
    monkeypatch.setattr("sys.argv", ["tampering", str(published)])
    with pytest.raises(SystemExit) as stopped:
        tampering.main()
    assert stopped.value.code == 1
    assert "| nothing | **passes** |" in capsys.readouterr().out
