"""What the launches on random weights make, find and report; that they really launch is in test_run_gpu.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import launches, random_checkpoint
from benchmarks.launches import LaunchArguments, end_of, made_up_rows
from dptune import InvalidArgument
from utils.data.prompts import PUBMED_PROMPT

SMALL = ["--shapes", "tiny", "--block", "32", "--rows", "5", "--steps", "2", "--more_steps", "1", "--texts", "3"]


def arguments(*flags: str) -> LaunchArguments:
    (args,) = launches.parse(LaunchArguments, args=[*SMALL, *flags])
    return args


def value_of(words: Sequence[str], flag: str) -> str:
    return words[list(words).index(flag) + 1]


class Machine:
    """Stands for the processes: writes the files that each leaves, or fails where told."""

    def __init__(self, *, failing: str = "", lost: int = 0) -> None:
        self.launched: list[str] = []
        self.failing, self.lost = failing, lost
        self.models: list[Path] = []

    def run(self, words: Sequence[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        program = next(
            word for word in words if word.endswith(".py") or word.startswith("benchmarks.random")
        ).removesuffix(".py")
        self.launched.append("resume" if "latest" in words else program)
        if program != "benchmarks.random_checkpoint":
            peak = Path(words[list(words).index("benchmarks.peak_memory") + 1])
            peak.write_text(str(7 << 20))
        if self.launched[-1] == self.failing:
            return subprocess.CompletedProcess(words, 3, b"one\nbroken here\n")
        output = Path(value_of(words, "--output_dir"))
        output.mkdir(parents=True, exist_ok=True)
        getattr(self, program.rpartition(".")[2])(words, output)
        return subprocess.CompletedProcess(words, 0, f"saved in {output}\n".encode())

    def random_checkpoint(self, _: Sequence[str], output: Path) -> None:
        assert not any(model.exists() for model in self.models), "a model of 7B takes 14 GB of the disk"
        self.models.append(output)
        (output / "model.safetensors").write_bytes(bytes(3 << 19))

    def train_clm(self, words: Sequence[str], output: Path) -> None:
        steps = int(value_of(words, "--max_train_steps"))
        rows = [{"step": step, "seconds": 0.25 * step} for step in range(steps + 1 - self.lost)]
        (output / "diagnostics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (output / "publish").mkdir(exist_ok=True)
        (output / "publish" / "privacy_report.json").write_text(json.dumps({"epsilon": 1.5, "steps": steps}))

    def inference_generation_dataset(self, words: Sequence[str], output: Path) -> None:
        count = int(value_of(words, "--num_samples")) - self.lost
        (output / "generations.jsonl").write_text(f"{json.dumps({'text': 'four'})}\n" * count)


Rows = dict[str, list[str]]


def launch(machine: Machine, args: LaunchArguments, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Rows]:
    """The exit status, and the rows of the table by launch."""
    monkeypatch.setattr(launches.subprocess, "run", machine.run)
    monkeypatch.setattr(sys, "argv", ["launches.py"])
    printed: list[str] = []
    monkeypatch.setattr(launches.tables, "publish", lambda parts, _: printed.extend(parts))
    status = launches.main(args)
    lines = [line.strip("| ").split(" | ") for part in printed for line in part.splitlines() if line.startswith("| ")]
    return status, {cells[0]: cells[1:] for cells in lines}


ALL = ["benchmarks.random_checkpoint", "train_clm", "resume", "inference_generation_dataset"]


def test_the_first_shape_is_also_resumed_and_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    status, rows = launch(machine, arguments("--shapes", "tiny", "llama-1b"), monkeypatch)
    assert status == 0
    assert machine.launched == [*ALL, *ALL[:2]]
    assert rows["tiny: write the checkpoint"][0] == "ok"
    assert rows["tiny: write the checkpoint"][-1] == "1.5 MiB of weights"
    assert rows["tiny: train"][2:] == ["0.25, 0.50", "7", "1.5000", "2 steps in the ledger"]
    assert rows["tiny: resume"][2:] == ["0.25, 0.50, 0.75", "7", "1.5000", "3 steps in the ledger"]
    assert rows["tiny: sample"][-1] == "3 texts, 12 characters"
    assert "llama-1b: train" in rows
    assert not any(model.exists() for model in machine.models)


@pytest.mark.parametrize(
    ("failing", "then"),
    [
        ("benchmarks.random_checkpoint", ALL[:1] * 2),
        ("train_clm", ALL[:2] * 2),
        ("resume", [*ALL, *ALL[:2]]),
        ("inference_generation_dataset", [*ALL, *ALL[:2]]),
    ],
)
def test_a_failure_stops_only_what_needs_it(failing: str, then: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(failing=failing)
    status, rows = launch(machine, arguments("--shapes", "tiny", "llama-1b"), monkeypatch)
    assert status == 1
    assert machine.launched == then
    assert "failed with status 3" in [cells[0] for cells in rows.values()]
    assert not any(model.exists() for model in machine.models)


def test_a_program_that_leaves_too_little_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    status, rows = launch(Machine(lost=1), arguments(), monkeypatch)
    assert status == 1
    assert rows["tiny: train"][0] == "failed: ValueError: 1 steps in diagnostics.jsonl, not 2"
    assert "tiny: resume" not in rows


def test_results_are_saved_after_each_launch_and_name_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "result.md"

    class Killed(BaseException):
        """Nothing runs after it."""

    machine = Machine()

    def run(words: Sequence[str], **kwargs: object) -> subprocess.CompletedProcess[bytes]:
        if len(machine.launched) == 2:
            raise Killed
        return machine.run(words, **kwargs)

    monkeypatch.setattr(launches.subprocess, "run", run)
    with pytest.raises(Killed):
        launches.main(arguments("--output", str(output)))
    written = output.read_text()
    assert "| tiny: train | ok |" in written
    assert "saved in FOLDER/tiny-run" in written


def test_rows_are_around_the_block_and_begin_as_samples_do() -> None:
    rows = list(made_up_rows(200, 64))
    assert {row["instruction"] for row in rows} == {PUBMED_PROMPT}
    lengths = [len(str(row["answer"])) for row in rows]
    assert min(lengths) >= 16
    assert min(lengths) < 24
    assert 64 < max(lengths) <= 72


def test_the_end_of_a_log_has_each_progress_bar_once() -> None:
    printed = "".join(f"line {number}\n" for number in range(40)) + "0%\r50%\r100%\r\n\nend\n"
    lines = end_of(printed).splitlines()
    assert lines[-2:] == ["100%", "end"]
    assert lines[0] == "line 22"
    assert len(lines) == 20


def test_a_checkpoint_loads_with_a_tokenizer_of_its_size(tmp_path: Path) -> None:
    flags = ["--shape", "tiny", "--output_dir", str(tmp_path), "--device", "cpu"]
    (args,) = random_checkpoint.parse(random_checkpoint.CheckpointArguments, args=flags)
    random_checkpoint.main(args)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert str(model.dtype) == "torch.bfloat16"
    assert len(tokenizer) == model.config.vocab_size == 400
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id)
    text = "Naïve <tokens>, of bytes."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([399]), "whatever a random model samples has a text"


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    assert len(random_checkpoint.byte_tokenizer(259)) == 259
    with pytest.raises(InvalidArgument, match="vocab_size=258: give at least 259"):
        random_checkpoint.byte_tokenizer(258)


@pytest.mark.parametrize("flag", ["--steps", "--more_steps", "--texts", "--block", "--rows"])
def test_mistakes_are_refused(flag: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{flag}=0"):
        arguments(flag, "0")
