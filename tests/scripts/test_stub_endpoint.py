"""The stub as a process: it prints its address, says what it is, and ends when told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from scripts import annotate, stub_endpoint
from utils.files.jsonl import write_jsonl
from utils.files.tables import read_rows

ROOT = Path(__file__).parents[2]


def test_it_serves_the_annotation_and_ends_on_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    write_jsonl(tmp_path / "in.jsonl", [{"id": "1", "instruction": "Say hello."}])
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.stub_endpoint", "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        line = ["--input_file", str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "out")]
        annotate.main([*line, "--base_url", url, "--model", "m"])
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert (out, errors) == ("", "STUB without a model: every answer is made up and begins with [stub answer]\n")
    (row,) = read_rows(tmp_path / "out" / "annotated.jsonl", "--file")
    assert row["answer"] == "[stub answer] No model wrote this. The instruction was: Say hello."
    assert '"stub (no model)"' in (tmp_path / "out" / "summary.json").read_text()


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"--port={port}: .*give another port, or 0"):
            stub_endpoint.main(["--port", str(port)])


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(InvalidArgument, match="--port"):
        stub_endpoint.main(["--port", port])
