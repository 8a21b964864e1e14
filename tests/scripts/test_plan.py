"""scripts/plan.py as a user runs it: its last line is a training that spends the same epsilon with the same noise."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import train_clm
from scripts import plan
from tests.fitted_rule import RULE, quick_noise

LINE = "--num_examples 200 --tokens_per_example 12.5 --hours 0.05 --target_epsilon 8 --tokens_per_second 1000"
SAME = (
    "expected batch size",
    "sampling probability",
    "steps",
    "clip norm",
    "noise multiplier",
    "epsilon",
)


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.planning.rule.read_rule", lambda: RULE)


def values(text: str) -> dict[str, str]:
    """{name: value} of printed lines."""
    return {line[:22].strip(): line[23:] for line in text.splitlines() if len(line) > 23 and line[22] == " "}


def test_the_printed_line_trains_with_what_was_proposed(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "my rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"The cat number {n} sat."}) + "\n" for n in range(200)))
    files = ["--train_file", str(rows), "--output_dir", str(tmp_path / "out")]
    with quick_noise():
        plan.main(["--model", str(tiny_model_dir), *LINE.split(), *files])
    told = capsys.readouterr().out
    assert told.splitlines()[-2] == "train with"
    python, program, *words = shlex.split(told.splitlines()[-1])
    assert (python, program) == ("python", "train_clm.py")
    # A table that takes seconds.
    monkeypatch.setattr("utils.training.causal_lm.plan.describe_needed_data", lambda _: [])
    train_clm.main([*words, "--dry_run"])
    proposed, dry = values(told), values(capsys.readouterr().out)
    assert {name: proposed[name] for name in SAME} == {name: dry[name] for name in SAME}
    for name in ("trainable parameters", "memory per device"):
        assert proposed[name] == dry[name]
    assert proposed.get("noise bands") == dry.get("noise bands")
    assert float(dry["epsilon"].split()[0]) <= 8


def test_the_plot_is_written(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trade.png"
    with quick_noise():
        plan.main(["--model_name_or_path", str(tiny_model_dir), *LINE.split(), "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"plot                   {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("--tokens_per_second 1000", ""), "error: --tokens_per_second=None: the speed is needed; give"),
        (("0.05", "1e-9"), "error: --hours='1e-09': one step takes"),
        (("epsilon 8", "epsilon 1e-7"), "error: --target_epsilon=1e-07: no batch reaches it"),
        (("--tokens_per_second 1000", "--for_device h1"), "error: --for_device='h1': give one of A100 40GB"),
        (("--hours", "--lora_target_modules nothing --hours"), "error: --lora_target_modules="),
        (("--hours", "--batches 3 --hours"), "error: unknown flag: --batches"),
    ],
)
def test_a_mistake_is_one_line(
    changes: tuple[str, str], told: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quick_noise(), pytest.raises(SystemExit) as ended:
        plan.main(["--model", str(tiny_model_dir), *LINE.replace(*changes).split()])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith(told)
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--model", str(tmp_path), *LINE.split()])
    assert capsys.readouterr().err.startswith(f"error: --model_name_or_path='{tmp_path}': no model could be loaded")
