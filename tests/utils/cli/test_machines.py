"""One process of each machine works, all wait for it, and its refusal reaches everybody."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dptune._validate import InvalidArgument, refuse
from tests.processes import run_processes
from utils.cli.machines import ALONE, Machine, machine_of


def gathered(*outcomes: object) -> Any:
    """A gather that finds these values of the other ranks, and this rank's in place of "own"."""
    return lambda value: [value if one == "own" else one for one in outcomes]


def test_a_single_process_does_its_work_itself() -> None:
    assert machine_of(SimpleNamespace(num_processes=1)) is ALONE  # type: ignore[arg-type]
    assert ALONE.works
    assert ALONE.once(lambda: 7) == 7
    ALONE.wait()
    with pytest.raises(InvalidArgument, match="no good"):
        ALONE.once(lambda: refuse("--x", 1, "no good"))


def test_the_result_is_that_of_ones_own_machine() -> None:
    """Two machines with two processes each."""
    outcomes = [("first", None), (None, None), ("second", None), "own"]
    machine = Machine(rank=3, local_rank=1, gather=gathered(*outcomes))
    assert not machine.works
    assert machine.once(lambda: pytest.fail("another process works")) == "second"
    assert Machine(2, 0, gathered(outcomes[0], outcomes[1], "own", (None, None))).once(lambda: "mine") == "mine"


def test_a_refusal_on_any_machine_is_raised_on_all() -> None:
    refusal = InvalidArgument("--train_file", "x", "row 3 is bad")
    for machine in (Machine(0, 0, gathered("own", (None, refusal))), Machine(1, 0, gathered((None, refusal), "own"))):
        with pytest.raises(InvalidArgument, match="row 3 is bad"):
            machine.once(lambda: "made")


def _work(rank: int, gather: Any, folder: Path) -> tuple[object, str, list[str]]:  # noqa: ARG001
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=rank, local_process_index=rank)
    machine = machine_of(accelerator)

    def work() -> str:
        (folder / f"made by {rank}").touch()
        return f"of {rank}"

    found = machine.once(work)
    machine.wait()
    try:
        machine.once(lambda: refuse("--train_file", "x", "row 3 is bad"))
    except InvalidArgument as error:
        return found, str(error), sorted(path.name for path in folder.iterdir())
    raise RuntimeError("nothing was refused")


def test_two_processes_of_one_machine(tmp_path: Path) -> None:
    told = "--train_file='x': row 3 is bad"
    assert run_processes(2, _work, tmp_path) == [("of 0", told, ["made by 0"])] * 2
