"""The first signal is a request, one that follows at once is the same, a later one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.cli import interruption
from utils.cli.interruption import StopRequest

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = [signal.SIGTERM, signal.SIGINT]

CHILD = """
import sys, time
from utils.cli.interruption import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    end = time.monotonic() + 60
    told = False
    while time.monotonic() < end:
        time.sleep(0.01)
        if stop.pending and not told:
            print(stop.name, flush=True)
            told = True
            if sys.argv[1] == "obedient":
                break
print("saved", flush=True)
"""


def child(kind: str) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", CHILD, kind],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_lets_the_process_end_in_its_own_time(number: signal.Signals) -> None:
    process = child("obedient")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == f"{number.name}\nsaved\n"
    assert process.returncode == 0
    assert err.strip() == f"{number.name}: stopping after this micro-batch (signal again to stop at once)"


@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1]])
def test_a_second_signal_counts_if_it_comes_more_than_a_second_later(
    first: signal.Signals, second: signal.Signals
) -> None:
    process = child("deaf")
    assert process.stdout is not None
    process.send_signal(first)
    assert process.stdout.readline() == f"{first.name}\n"
    process.send_signal(second)
    time.sleep(0.2)
    assert process.poll() is None  # the same request, passed on by a launcher
    time.sleep(interruption._SAME_REQUEST)
    process.send_signal(second)
    out, err = process.communicate(timeout=30)
    assert process.returncode == -second
    assert out == ""
    assert err.count("stopping after this micro-batch") == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_is_recorded_and_the_handlers_are_restored(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopRequest() as stop:
        assert [signal.getsignal(one) for one in SIGNALS] == [stop._receive] * 2
        assert not stop.pending
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.pending
        os.kill(os.getpid(), next(one for one in SIGNALS if one != number))
        assert stop.name == number.name  # the first one's
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert capfd.readouterr().err.count("\n") == 2


def test_the_handlers_are_restored_after_an_error_too() -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(OSError, match="full"), StopRequest():
        raise OSError("full")
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_only_the_main_process_prints(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.pending
    assert capfd.readouterr().err == ""


def test_a_signal_within_a_write_to_stderr_breaks_no_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler may run in the middle of a buffered write, and one that writes there itself raises RuntimeError."""

    class Busy:
        def write(self, _text: str) -> None:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

        flush = write

    monkeypatch.setattr(sys, "stderr", Busy())
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.pending
