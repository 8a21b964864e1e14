"""What stands beside the texts: which become instructions, what is counted, AlpacaEval's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from utils.data.instruction_files import Instruction
from utils.generation.arguments import SamplingArguments
from utils.generation.files import Generation, append_generations, merge_generations
from utils.generation.outputs import SamplingSpeed, Summary, write_alpaca_eval, write_sampling_outputs

TEXTS = [
    ("Name a bird.", True),
    ("cut off in the", False),
    ("", True),
    ("Name a bird.", True),
    (" \n", True),
    ("", False),
    ("name a bird.", True),
    ("cut off in the", True),
    ("Two\nlines\u2028and é", True),
    ("Name a bird.", False),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows: list[Generation] = [
        {"prompt": f"p{index}", "text": text, "index": index, "ended": ended}
        for index, (text, ended) in enumerate(TEXTS)
    ]
    append_generations(tmp_path, 0, rows[::-1])
    merge_generations(tmp_path, len(rows))
    return tmp_path / "generations.jsonl"


def _instructions(path: Path) -> list[dict[str, Any]]:
    lines = path.with_name("instructions.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("how", [{"deduplicate": True}, {"prompt_style": "uncond_generation"}])
def test_instructions_are_the_texts_that_ended_without_blanks_and_repeats(path: Path, how: dict[str, Any]) -> None:
    write_sampling_outputs(path, SamplingArguments("unused", **how), [SamplingSpeed(1, 1.0)])
    kept = {0: "Name a bird.", 6: "name a bird.", 7: "cut off in the", 8: "Two\nlines\u2028and é"}
    assert _instructions(path) == [{"id": f"syn-{index}", "instruction": text} for index, text in kept.items()]


def test_without_being_asked_for_no_instructions_are_written(path: Path) -> None:
    write_sampling_outputs(path, SamplingArguments("unused"), [])
    assert sorted(one.name for one in path.parent.iterdir()) == ["generations.jsonl", "summary.json"]


def test_the_summary_counts_every_text_once(path: Path) -> None:
    summary = write_sampling_outputs(
        path, SamplingArguments("unused"), [SamplingSpeed(60, 2.0), SamplingSpeed(40, 4.0)]
    )
    assert summary == Summary(texts=10, ended=7, blank=2, duplicates=1, kept=4, tokens_per_second=25.0)
    assert summary.ended == summary.blank + summary.duplicates + summary.kept
    assert json.loads(path.with_name("summary.json").read_text())["tokens_per_second"] == 25.0
    assert (
        str(summary)
        == "7 of 10 texts ended before the length limit: 2 blank, 1 copies of others, 4 different ones, 25 tokens/s"
    )


def test_a_run_with_nothing_left_to_draw_has_no_speed(path: Path) -> None:
    summary = write_sampling_outputs(path, SamplingArguments("unused"), [SamplingSpeed(0, 0.1)])
    assert summary.tokens_per_second is None
    assert str(summary).endswith("4 different ones")


def test_alpaca_eval_gets_every_output_in_the_instructions_order(path: Path) -> None:
    asked = [Instruction(f"do {index}", "koala" if index % 2 else None) for index in range(len(TEXTS))]
    rows = json.loads(write_alpaca_eval(path, asked, "mine").read_text(encoding="utf-8"))
    assert [(row["instruction"], row["output"], row["generator"]) for row in rows] == [
        (f"do {index}", text, "mine") for index, (text, _) in enumerate(TEXTS)
    ]
    assert [row.get("dataset") for row in rows] == [None, "koala"] * 5
    assert "dataset" not in rows[0]


def test_texts_that_were_all_cut_are_no_alarm() -> None:
    told = str(Summary(texts=20, ended=0, blank=0, duplicates=0, kept=0, tokens_per_second=None))
    assert told == "0 of 20 texts ended before the length limit, the others were cut there"
