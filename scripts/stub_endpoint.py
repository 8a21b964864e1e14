"""A stand-in for an OpenAI-compatible endpoint, without a model: it gives a fixed answer at once.

    python -m scripts.stub_endpoint --port 0 > url.txt &

Once it listens, it prints its address on stdout (`http://127.0.0.1:PORT/v1`, for --base_url of `scripts/annotate.py`)
and a warning that it is a stub on stderr. Every answer begins with "[stub answer]". Only this machine can reach it.
Stop it with SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from dptune._validate import refuse
from utils.annotation.stub_endpoint import MARK, StubServer
from utils.cli.flags import exit_on_invalid_argument, parse

_LAST_PORT = 65535


@dataclass
class StubArguments:
    """The server's address."""

    _argument_group_name = "stub"

    port: int = field(default=0, metadata={"help": "port on 127.0.0.1; 0 takes any free port"})

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _LAST_PORT:
            refuse("--port", self.port, f"give a number from 0 to {_LAST_PORT}")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop.

    Args:
        argv: the command line; `sys.argv[1:]` if None.

    Raises:
        InvalidArgument: the port is not available.
    """
    (args,) = parse(StubArguments, args=argv, description=__doc__)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with _listen(args.port) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        print(f"STUB without a model: every answer is made up and begins with {MARK}", file=sys.stderr, flush=True)
        print(server.base_url, flush=True)
        stop.wait()
        server.shutdown()
        thread.join()


def _listen(port: int) -> StubServer:
    try:
        return StubServer(port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        refuse("--port", port, f"{error.strerror}; give another port, or 0 for any free port")


if __name__ == "__main__":
    with exit_on_invalid_argument(StubArguments):
        main()
