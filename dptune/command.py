"""The command `dptune`, with a subcommand for each program. `dptune --help` lists them; see docs/reference/command.md.

The programs stand at the root of the repository. An installed package holds a copy of them in `dptune/_programs`, where
they need the libraries of `pip install 'dptune[scripts]'`.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

_COPY = Path(__file__).parent / "_programs"
ROOT = _COPY if _COPY.is_dir() else _COPY.parents[1]
_LAUNCHER = "utils.cli.launcher"
_PACKAGE = "dptune."  # what begins so comes with the engine
_SHELL = ".sh"


class Program(NamedTuple):
    """What a subcommand runs.

    Attributes:
        does: what it does, for --help.
        names: a module's name, or the path of a shell script from the root. The flags choose among several modules.
        launched: whether it takes the launcher's flags, such as --num_processes.
    """

    does: str
    names: tuple[str, ...]
    launched: bool = False

    @property
    def exists(self) -> bool:
        """Whether the program is there."""
        name = self.names[0]
        if name.startswith(_PACKAGE):
            return importlib.util.find_spec(name) is not None
        path = ROOT / (name if name.endswith(_SHELL) else f"{name.replace('.', '/')}.py")
        return path.is_file()


# To add a subcommand, add a line. One whose program is not there is not listed.
SUBCOMMANDS = {
    "train": Program("fine-tune a language model with differential privacy", ("train_clm",), launched=True),
    "classify": Program("fine-tune a sentence classifier", ("train_classifier",), launched=True),
    "sample": Program(
        "sample texts for --instruction_file, or for the prompt of a --dataset_name",
        ("inference_generation_instruction", "inference_generation_dataset"),
        launched=True,
    ),
    "plan": Program("propose batch, steps, noise and learning rate for a time and an epsilon", ("scripts.plan",)),
    "epsilon": Program("tabulate epsilon or noise by batch size and epochs", ("dptune.accounting",)),
    "budget": Program("add up what several releases spent, or keep a register of them", ("dptune.budget",)),
    "audit": Program("compare what an adversary wins with the stated epsilon", ("dptune.audit",)),
    "attack": Program("attack a trained model: what can be learned of its training rows", ("scripts.attack",)),
    "verify": Program("compute the epsilon of a release again from what is published", ("dptune.verify",)),
    "merge": Program("merge an adapter into its base model", ("scripts.merge",)),
    "push": Program("verify what a run may publish, and upload it to the hub", ("scripts.push",)),
    "look": Program("look at the rows that a training would read", ("scripts.look",)),
    "predict": Program("classify texts with a trained classifier", ("scripts.predict",)),
    "demo": Program("fine-tune a real 135M-parameter model at epsilon 8, in this folder", ("scripts/demo.sh",)),
}
# {subcommand: (a flag that its earlier program needs and this one lacks, the subcommand that runs the earlier one)}
MOVED = {"plan": ("--batch_size", "epsilon")}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        argv: the subcommand and its flags; `sys.argv[1:]` if None.
    """
    name, *line = (sys.argv[1:] if argv is None else argv) or ["--help"]
    name = _now_called(name, line)
    known = {one: program for one, program in SUBCOMMANDS.items() if program.exists}
    if name in ("-h", "--help"):
        print(describe_programs(known))
    elif name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        _exit_with(f"unknown subcommand: {name}{hint}; dptune --help lists them")
    elif known[name].names[0].endswith(_SHELL):
        _run_shell(name, known[name], line)
    else:
        _run_module(name, known[name], line)


def _now_called(name: str, line: Sequence[str]) -> str:
    """The subcommand that runs what was meant: another one if the flags are of a program that moved."""
    flag, other = MOVED.get(name, ("", name))
    if not any(word.partition("=")[0] == flag for word in line):
        return name
    print(f"note: dptune {name} with {flag} is now dptune {other}", file=sys.stderr)
    return other


def describe_programs(known: dict[str, Program]) -> str:
    """What --help prints: each subcommand with what it does."""
    lines = [f"  {name:<9} {program.does}" for name, program in known.items()]
    launched = [name for name, program in known.items() if program.launched]
    notes = [
        "dptune SUBCOMMAND --help shows the flags of a subcommand.",
        *([f"For several processes, give --num_processes N to {', '.join(launched)}."] if launched else []),
    ]
    return "\n".join(["usage: dptune SUBCOMMAND [flags]", "", *lines, "", *notes])


def _run_module(name: str, program: Program, line: Sequence[str]) -> None:
    """Run a module in this process, with the root first on the path, as `python train_clm.py` has it."""
    sys.path.insert(0, str(ROOT))
    module, line = (_LAUNCHER, [",".join(program.names), *line]) if program.launched else (program.names[0], line)
    sys.argv[1:] = line
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        _exit_with(f"dptune {name} needs {error.name}: pip install 'dptune[scripts]'")


def _run_shell(name: str, program: Program, line: Sequence[str]) -> None:
    """Replace this process by a shell script, which works in the current folder."""
    if line:
        _exit_with(f"dptune {name} takes no flags: it is to {program.does}")
    shell = shutil.which("bash")
    if shell is None:
        _exit_with(f"dptune {name} needs bash, which is not installed")
    environment = {**os.environ, "PYTHON": sys.executable, "DEMO_HOME": str(Path.cwd())}
    os.execve(shell, [shell, str(ROOT / program.names[0])], environment)


def _exit_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
