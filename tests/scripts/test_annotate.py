"""Annotating end to end against a real server: kills, stops, garbage, and a key that is nowhere to be seen."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from dptune._validate import InvalidArgument
from dptune.run.lock import LOCK_NAME, FolderLock
from scripts import annotate
from tests.endpoint import Fault, FaultyServer, body, changed, rate_limit, status
from utils.annotation.files import ReplyJournal
from utils.annotation.stub_endpoint import completion
from utils.cli.flags import exit_on_invalid_argument
from utils.files.jsonl import write_jsonl
from utils.files.tables import read_rows

ROOT = Path(__file__).parents[2]
KEY = "sk-0815-not-to-be-seen"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def flags(tmp_path: Path, server: FaultyServer, *more: str) -> list[str]:
    line = ["--input_file", str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "out")]
    return [*line, "--base_url", server.base_url, "--model", "m", "--max_retries", "1", *more]


def write_input(tmp_path: Path, count: int) -> list[dict[str, Any]]:
    rows = [{"id": f"syn-{i}", "instruction": f"instruction {i}", "bucket": i % 7} for i in range(count)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    return rows


def answer_to(instruction: str) -> str:
    return completion(instruction)["choices"][0]["message"]["content"]


def start(line: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.annotate", *line]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def journalled(tmp_path: Path) -> set[str]:
    lines = (tmp_path / "out" / "answers.jsonl").read_text().split("\n")
    return {json.loads(line)["id"] for line in lines if line.endswith("}")}


def test_rows_are_carried_along_in_order_with_their_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_input(tmp_path, 25)
    with FaultyServer({"instruction 3": [rate_limit(0.2)], "instruction 4": [status(503)]}) as server:
        annotate.main(flags(tmp_path, server, "--price_per_million_input", "1", "--price_per_million_output", "2"))
    expected = [{**row, "answer": answer_to(row["instruction"])} for row in rows]
    assert read_rows(tmp_path / "out" / "annotated.jsonl", "--file") == expected
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["answered"], summary["set_aside"], summary["prompt_tokens"]) == (25, 0, 50)
    assert summary["cost"] == pytest.approx((50 + 2 * summary["completion_tokens"]) / 1e6)
    host = server.base_url.removeprefix("http://").removesuffix("/v1")
    assert f"sending 25 instructions to {host} for m; 0 have a reply already" in capsys.readouterr().out


def test_a_run_that_is_done_asks_nothing(tmp_path: Path) -> None:
    write_input(tmp_path, 5)
    with FaultyServer() as server:
        annotate.main(flags(tmp_path, server))
        before = (tmp_path / "out" / "annotated.jsonl").read_bytes()
        annotate.main(flags(tmp_path, server))
    assert server.counts.total() == 5
    assert (tmp_path / "out" / "annotated.jsonl").read_bytes() == before


def test_what_is_asked_is_what_the_flags_say(tmp_path: Path) -> None:
    write_input(tmp_path, 1)
    more = ["--temperature", "0", "--system_prompt", "Be brief.", "--max_tokens", "7"]
    with FaultyServer() as server:
        annotate.main(flags(tmp_path, server, *more, "--token_limit_field", "max_completion_tokens"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "instruction 0"}]
    asked = {"model": "m", "max_completion_tokens": 7, "temperature": 0.0, "messages": messages}
    assert server.bodies == [asked]


def test_without_flags_the_endpoint_decides_on_the_rest(tmp_path: Path) -> None:
    write_input(tmp_path, 1)
    with FaultyServer() as server:
        annotate.main(flags(tmp_path, server))
    messages = [{"role": "user", "content": "instruction 0"}]
    assert server.bodies == [{"model": "m", "max_tokens": 1024, "messages": messages}]


def test_garbage_is_set_aside_with_the_reason_and_asked_again_on_demand(tmp_path: Path) -> None:
    rows = write_input(tmp_path, 8)
    faults: dict[str, list[Fault | None]] = {
        "instruction 1": [body(b"<html>")],
        "instruction 2": [body(b"{}")],
        "instruction 3": [changed(content=" ")],
        "instruction 4": [changed(finish_reason="length")],
        "instruction 5": [status(500), status(500), changed(content=None)],
    }
    reasons = {
        "syn-1": "the body is not JSON",
        "syn-2": "no choices in the body",
        "syn-3": "blank content",
        "syn-4": "cut off at the token limit (finish_reason length)",
        "syn-5": "HTTP 500",
    }
    with FaultyServer(faults) as server:
        annotate.main(flags(tmp_path, server))
        aside = read_rows(tmp_path / "out" / "set_aside.jsonl", "--file")
        assert aside == [{**row, "reason": reasons[row["id"]]} for row in rows if row["id"] in reasons]
        kept = [row["id"] for row in read_rows(tmp_path / "out" / "annotated.jsonl", "--file")]
        assert kept == ["syn-0", "syn-6", "syn-7"]
        asked = server.counts.total()
        annotate.main(flags(tmp_path, server))
        assert server.counts.total() == asked, "what was set aside is not asked again by itself"
        annotate.main(flags(tmp_path, server, "--retry_set_aside"))
    assert server.counts.total() == asked + 5
    assert read_rows(tmp_path / "out" / "set_aside.jsonl", "--file") == [{**rows[5], "reason": "no content"}]
    assert len(read_rows(tmp_path / "out" / "annotated.jsonl", "--file")) == 7


def test_a_row_that_is_never_taken_does_not_keep_others_from_being_asked_again(tmp_path: Path) -> None:
    rows = write_input(tmp_path, 5)
    faults: dict[str, list[Fault]] = {"instruction 1": [status(400)] * 9, "instruction 2": [body(b"garbage")]}
    with FaultyServer(faults) as server:
        annotate.main(flags(tmp_path, server))
        assert [row["id"] for row in read_rows(tmp_path / "out" / "set_aside.jsonl", "--file")] == ["syn-1", "syn-2"]
        annotate.main(flags(tmp_path, server, "--retry_set_aside"))
        aside = read_rows(tmp_path / "out" / "set_aside.jsonl", "--file")
        assert aside == [{**rows[1], "reason": "HTTP 400"}]
        annotate.main(flags(tmp_path, server, "--retry_set_aside"))  # that row alone
    assert read_rows(tmp_path / "out" / "set_aside.jsonl", "--file") == aside


def test_an_endpoint_that_has_changed_is_told_from_a_row_that_is_not_taken(tmp_path: Path) -> None:
    write_input(tmp_path, 3)
    with FaultyServer({"instruction 1": [body(b"garbage"), status(404)]}) as server:
        annotate.main(flags(tmp_path, server))
        with pytest.raises(InvalidArgument, match="no such route or model"):
            annotate.main(flags(tmp_path, server, "--retry_set_aside"))


def test_what_was_mended_after_no_answer_came_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    write_input(tmp_path, 3)
    with FaultyServer({"instruction 0": [status(404)]}) as server:
        with pytest.raises(InvalidArgument, match="check --model"):
            annotate.main(flags(tmp_path, server))
        annotate.main([*flags(tmp_path, server), "--max_tokens", "77"])
    assert len(read_rows(tmp_path / "out" / "annotated.jsonl", "--file")) == 3


def test_after_a_kill_nothing_is_asked_twice_and_nothing_is_lost(tmp_path: Path) -> None:
    rows, concurrency = write_input(tmp_path, 150), 4
    line: list[str] = ["--max_concurrency", str(concurrency)]
    with FaultyServer({"instruction 10": [body(b"garbage")]}, delay=0.01) as server:
        process = start(flags(tmp_path, server, *line))
        wait_for(lambda: len(server.asked) >= 60, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept, asked = journalled(tmp_path), set(server.asked)
        assert not (tmp_path / "out" / "annotated.jsonl").exists()
        assert len(asked) - len(kept) <= concurrency
        annotate.main(flags(tmp_path, server, *line))
    by_id = {row["instruction"]: row["id"] for row in rows}
    twice = {by_id[name] for name, count in server.counts.items() if count > 1}
    assert not twice & kept, "what was answered is not asked again"
    assert len(twice) <= concurrency
    assert max(server.counts.values()) <= 2
    expected = [{**row, "answer": answer_to(row["instruction"])} for row in rows if row["id"] != "syn-10"]
    assert read_rows(tmp_path / "out" / "annotated.jsonl", "--file") == expected
    assert [row["id"] for row in read_rows(tmp_path / "out" / "set_aside.jsonl", "--file")] == ["syn-10"]


def test_ctrl_c_waits_for_what_is_under_way_and_names_the_line_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_input(tmp_path, 120)
    with FaultyServer(delay=0.02) as server:
        line = flags(tmp_path, server, "--system_prompt", "two words")
        interrupting = threading.Thread(target=interrupt_after, args=(server, 30))
        interrupting.start()
        with pytest.raises(SystemExit) as caught:
            annotate.main(line)
        interrupting.join()
        assert caught.value.code == 130
        assert 30 <= len(server.asked) < 100
        kept = journalled(tmp_path)
        assert kept == {row["id"] for row in rows if row["instruction"] in set(server.asked)}
        told = capsys.readouterr().err.splitlines()
        assert f"SIGINT: replies for {len(kept)} of 120 rows are saved; to resume, run:" in told
        assert told[-1] == f"python -m scripts.annotate {' '.join(line[:-1])} 'two words'"
        assert not (tmp_path / "out" / "annotated.jsonl").exists()
        annotate.main(line)
    assert set(server.counts.values()) == {1}
    assert len(read_rows(tmp_path / "out" / "annotated.jsonl", "--file")) == 120


def interrupt_after(server: FaultyServer, count: int) -> None:
    """What Ctrl-C does, once so many were asked."""
    deadline = time.monotonic() + 60
    while len(server.asked) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGINT)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_input(tmp_path, 2)
    (tmp_path / "out").mkdir()
    with FaultyServer() as server, FolderLock() as other:
        other.take(tmp_path / "out")
        with pytest.raises(InvalidArgument, match="another process is at work in it"):
            annotate.main(flags(tmp_path, server))
    assert server.asked == []


def test_a_new_folder_is_locked_before_anything_is_written_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(tmp_path, 2)
    found, claim = [], ReplyJournal.claim

    def claiming(*args: Any) -> None:
        found.extend(path.name for path in (tmp_path / "out").iterdir())
        with FolderLock() as other, pytest.raises(InvalidArgument, match="another process is at work in it"):
            other.take(tmp_path / "out")
        claim(*args)

    monkeypatch.setattr(ReplyJournal, "claim", claiming)
    with FaultyServer() as server:
        annotate.main(flags(tmp_path, server))
    assert found == [LOCK_NAME]


def test_a_folder_with_other_answers_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    write_input(tmp_path, 2)
    with FaultyServer() as server:
        annotate.main(flags(tmp_path, server))
        with pytest.raises(InvalidArgument, match="model was 'm' and is 'other'"):
            annotate.main([*flags(tmp_path, server), "--model", "other"])
    assert server.counts.total() == 2


@pytest.mark.parametrize("number", [400, 401, 500])
def test_the_key_is_nowhere_to_be_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int) -> None:
    """Neither printed nor in a file, while the endpoint repeats it, and the instruction, in its errors."""
    write_input(tmp_path, 3)
    message = f"no: Authorization: Bearer {KEY}; instruction 1"
    refused = status(number, message, KEY)
    with FaultyServer({f"instruction {i}": [refused] * 2 for i in ((0, 1, 2) if number == 401 else (1,))}) as server:
        with pytest.raises(SystemExit) if number == 401 else nullcontext(), exit_on_invalid_argument():
            annotate.main(flags(tmp_path, server))
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    shown = capfd.readouterr()
    reason = shown.err if number == 401 else (tmp_path / "out" / "set_aside.jsonl").read_text()
    assert f"HTTP {number}" in reason
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3
    assert not any(KEY in text or "no: Authorization" in text for text in [shown.out, shown.err, *written])


def test_a_key_on_the_command_line_is_an_unknown_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(tmp_path, 1)
    for spelling in (["--api_key", KEY], [f"--api_key={KEY}"], ["--api-key", KEY], [f"--openai_api_key={KEY}"]):
        with FaultyServer() as server, pytest.raises(SystemExit) as caught:
            annotate.main([*flags(tmp_path, server), *spelling])
        assert caught.value.code == 2
        assert server.asked == []
        shown = capsys.readouterr()
        assert "unknown flag" in shown.err
        assert KEY not in shown.err + shown.out


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "a"}], "found the columns text; one must be named instruction"),
        ([{"instruction": "a"}, {"text": "b"}], r"row 2 .*instruction is missing"),
        ([{"instruction": "a"}, {"instruction": None}], r"row 2 .*is not text \(no value\)"),
        ([{"instruction": " \n"}], "row 1 .*is blank"),
        ([{"instruction": "a", "context": "secret"}], "row 1 .*context would be left out"),
        ([{"instruction": "a", "score": math.inf}], "row 1 .*a value that JSON cannot hold"),
        ([{"instruction": "a", "note": "half \ud800 a pair"}], "row 1 .*a value that JSON cannot hold"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused_unseen(tmp_path: Path, rows: list[Any], told: str) -> None:
    (tmp_path / "in.json").write_text(json.dumps(rows))
    with pytest.raises(InvalidArgument, match=told) as caught:
        annotate.read_instructions(str(tmp_path / "in.json"))
    assert "half" not in str(caught.value)


def test_rows_without_an_id_get_their_number(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(
        json.dumps([{"instruction": "a"}, {"instruction": "b", "id": 7}, {"instruction": "c", "id": ""}])
    )
    ids = [row["id"] for row in annotate.read_instructions(str(tmp_path / "in.json"))]
    assert ids == ["row-1", "7", "row-3"]


def test_rows_alike_are_asked_once_and_both_answered(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"id": "1", "instruction": "a", "copy": copy} for copy in (0, 1)])
    with FaultyServer() as server:
        annotate.main(flags(tmp_path, server))
    assert server.asked == ["a"]
    assert [row["copy"] for row in read_rows(tmp_path / "out" / "annotated.jsonl", "--file")] == [0, 1]


def test_no_usable_answer_at_all_is_an_error(tmp_path: Path) -> None:
    write_input(tmp_path, 3)
    with FaultyServer(always=body(b"")) as server, pytest.raises(InvalidArgument, match="no row got a usable answer"):
        annotate.main(flags(tmp_path, server))
    assert len(read_rows(tmp_path / "out" / "set_aside.jsonl", "--file")) == 3
