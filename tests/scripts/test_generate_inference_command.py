"""The sampling jobs: the line that is printed, what is refused, and one job run to its instructions."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from scripts.generate_inference_command import main
from utils.cli.flags import parse
from utils.cli.launch_lines import PLAIN_CONFIG, SHARDED_CONFIG
from utils.generation.arguments import AdapterArguments, SamplingArguments
from utils.models.arguments import ModelArguments

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "inference_generation_instruction.py"
NEEDED = ["--instruction_file", "my file.txt", "--model_name_or_path", "BASE", "--job_sess", "debug"]


def _line(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The words of the line that is printed."""
    main([*NEEDED, "--print_only", *argv])
    return shlex.split(capsys.readouterr().out)


def _flags(words: list[str]) -> dict[str, str]:
    """--name value pairs behind the script."""
    own = words[words.index(SCRIPT) + 1 :]
    return dict(zip(own[::2], own[1::2], strict=True))


def test_the_requirements_line_becomes_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    """Type B, as the users write it."""
    how = ["--adapter_path", "OUT", "--block_size", "1024", "--top_p", "0.95", "--prompt_style", "uncond_generation"]
    words = _line(capsys, *how)
    older = [*NEEDED, *(word.replace("block_size", "max_seq_len") for word in how)]
    main([*(word.replace("model_name_or_path", "model_name") for word in older), "--print_only"])
    assert shlex.split(capsys.readouterr().out) == words
    assert words[:6] == ["accelerate", "launch", "--config_file", PLAIN_CONFIG, "--num_processes", "1"]
    assert _flags(words) == {
        "--instruction_file": "my file.txt",
        "--model_name_or_path": "BASE",
        "--lora_weights_path": "OUT",
        "--output_dir": "inference_outputs/debug",
        "--max_length": "1024",
        "--top_p": "0.95",
        "--temperature": "1.0",
        "--batch_size": "8",
        "--prompt_style": "uncond_generation",
        "--backend": "hf",
    }


def test_every_flag_of_the_line_is_one_of_the_inference_script(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:8000/v1"
    words = _line(
        capsys, "--adapter_path", "OUT", "--backend", "vllm", "--vllm_url", url, "--", "--stop", "USER:", "\n"
    )
    own = words[words.index(SCRIPT) + 1 :]
    place = own.index("--instruction_file")
    _, adapter, sampling = parse(
        ModelArguments, AdapterArguments, SamplingArguments, args=own[:place] + own[place + 2 :]
    )
    assert adapter.lora_weights_path == "OUT"
    assert (sampling.vllm_url, sampling.stop, sampling.backend) == (url, ["USER:", "\n"], "vllm")


def test_several_gpus_draw_apart_or_share_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert _line(capsys, "--gpus", "4")[2:7] == ["--config_file", PLAIN_CONFIG, "--num_processes", "4", "--multi_gpu"]
    words = _line(capsys, "--gpus", "4", "--shard")
    assert words[2:7] == ["--config_file", SHARDED_CONFIG, "--num_processes", "4", SCRIPT]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--job_sess", "../up"], "^--job_sess='../up': give the name"),
        (["--job_sess", ".."], r"^--job_sess='\.\.'"),
        (["--job_sess", ""], "^--job_sess=''"),
        (["--gpus", "0"], "^--gpus=0"),
        (["--shard"], "^--shard=True: .*--gpus 2"),
        (["--", "--output_dir", "x"], "^--output_dir='after --': give --job_sess before"),
        (["--", "--max-length=3"], "^--max_length='after --': give --block_size before"),
    ],
)
def test_mistakes_are_refused_by_name(argv: list[str], expected: str) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        main([*NEEDED, "--print_only", *argv])


def _run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    line = [sys.executable, *words]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_the_exit_status_is_the_launchs() -> None:
    """The launch stands in for itself: what it returns is what the job returns."""
    program = (
        "import sys, scripts.generate_inference_command as job\n"
        "job.as_command = lambda words: [sys.executable, '-c', 'raise SystemExit(7)']\n"
        f"job.main({NEEDED})"
    )
    done = _run("-c", program, cwd=ROOT)
    assert done.returncode == 7, done.stderr
    assert shlex.split(done.stdout)[:2] == ["accelerate", "launch"]  # printed before it runs


def test_a_job_leaves_its_instructions_in_its_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    """From a folder that shows the repository's files, so that nothing is written into it."""
    for name in ("scripts", "accelerate_configs", SCRIPT):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "empty.txt").write_text(" #### 5\n")
    job = ["--instruction_file", "empty.txt", "--model_name_or_path", str(tiny_model_dir), "--job_sess", "debug"]
    job += ["--block_size", "24", "--prompt_style", "uncond_generation", "--", "--stop", "e", "a"]
    done = _run("-m", "scripts.generate_inference_command", *job, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "inference_outputs" / "debug"
    rows = [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(5))
    assert (output / "instructions.jsonl").exists()
    assert json.loads((output / "summary.json").read_text())["texts"] == 5


@pytest.mark.parametrize("url", ["http://me:{}@127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1?key={}"])
def test_a_password_in_an_address_is_refused_and_not_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    secret, told = "hunter2", r"^--vllm_url: give scheme, host and path only; .*VLLM_API_KEY"
    url = url.format(secret)
    with pytest.raises(InvalidArgument, match=told) as error:
        main([*NEEDED, "--print_only", "--backend", "vllm", "--vllm_url", url])
    assert secret not in str(error.value) + capsys.readouterr().out
    with pytest.raises(InvalidArgument, match=told):
        SamplingArguments("out", backend="vllm", vllm_url=url)
