"""A merged model carries the guarantee of its adapter, and its card says how to load a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune.report.check import check_publishable
from dptune.report.merged import card_of_merged, carry_guarantee
from tests.dptune.report.test_check import private_run

pytestmark = pytest.mark.usefixtures("no_plots")


def test_report_card_and_ledger_are_carried_and_pass_the_check(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "merged").mkdir()
    adapter, merged = private_run(tmp_path / "run"), tmp_path / "merged"
    (adapter / "dptune_settings.json").write_text("{}")
    (merged / "model.safetensors").write_text("weights")
    statement = carry_guarantee(adapter, merged)
    assert statement is not None
    assert check_publishable(merged) == check_publishable(adapter) == statement
    same = ("privacy_report.json", "ledger.jsonl", "dptune_settings.json")
    assert all((merged / name).read_bytes() == (adapter / name).read_bytes() for name in same)
    card, before = ((folder / "README.md").read_text() for folder in (merged, adapter))
    assert 'library_name: "transformers"' in card
    assert "peft" not in card.lower()
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card
    assert "so the guarantee of the\nadapter holds for this model too" in card
    above, below = "## How to load it", "Made with "
    what = "\nA LoRA adapter for `ann/base`"
    known = before.partition(above)[0].replace('"peft"', '"transformers"')
    assert what in known
    assert card.partition(above)[0] == known.replace(what, f"{what}, merged into its weights")
    assert card.partition(below)[2] == before.partition(below)[2]


def test_what_a_user_wrote_stays() -> None:
    card = "# Mine\n\n## How to load it\n\nSo and so.\n\n## How to repeat it\n\nThus.\n"
    assert card_of_merged(card).startswith("# Mine\n\n## How to load it\n\nThe adapter is merged")
    assert card_of_merged(card).endswith("## How to repeat it\n\nThus.\n")
    assert "So and so." not in card_of_merged(card)
    assert card_of_merged("# Mine\n").startswith("# Mine\n\n## How to load it\n\nThe adapter is merged")


def test_without_a_report_nothing_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "merged").mkdir()
    for name in ("README.md", "dptune_settings.json"):
        (tmp_path / "adapter" / name).write_text("{}")
    assert carry_guarantee(tmp_path / "adapter", tmp_path / "merged") is None
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["dptune_settings.json"]
