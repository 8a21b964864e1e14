"""Flags of the data: their names on the command line, and the prompt styles that they take."""

from __future__ import annotations

import pytest

from utils.cli.flags import parse
from utils.data.prompts import PROMPT_STYLES
from utils.training.data_arguments import DataArguments


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_each_prompt_style_is_taken(style: str) -> None:
    (data,) = parse(DataArguments, args=["--train_file", "rows.jsonl", "--prompt_style", style, "--block_size", "48"])
    assert data == DataArguments(train_file=["rows.jsonl"], prompt_style=style, block_size=48)


def test_another_prompt_style_is_refused_with_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(DataArguments, args=["--prompt_style", "poem"])
    assert ended.value.code == 2
    assert "--prompt_style" in capsys.readouterr().err.strip().splitlines()[-1]
