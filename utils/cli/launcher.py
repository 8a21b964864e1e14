"""What `dptune train`, `classify` and `sample` do: choose the program by its flags, and start its processes.

Without a flag of the launcher the program runs in this process, as `python train_clm.py ...` does. With one,
accelerate's launcher starts it. The flags are checked first, so a mistake is one line and takes no start of processes.
When a started process fails, it has told why; the launcher adds no report of its own, and exits with its status.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dptune._aliases import canonical
from dptune._validate import HIDDEN, refuse
from utils.cli.flags import exit_on_invalid_argument, given_fields, parse
from utils.cli.launch_lines import PLAIN_CONFIG
from utils.cli.parser import exit_with

ROOT = Path(__file__).resolve().parents[2]  # of the repository, or of its copy in the installed package
# Flags of `accelerate launch` that are passed on, besides those that begin with --fsdp_, which take a value.
WITH_VALUE = (
    *("config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"),
    *("mixed_precision", "gpu_ids", "num_cpu_threads_per_process", "rdzv_backend", "rdzv_conf"),
)
SWITCHES = ("multi_gpu", "use_fsdp", "same_network")
_FSDP = "fsdp_"
_UNSHARDED = ("NO", False, None)  # `distributed_type` of a configuration; YAML reads a bare NO as false
_KILLED_BY = 128  # added to a signal's number, as shells do


def main(argv: Sequence[str] | None = None) -> None:
    """Run a program, in this process or through the launcher.

    Args:
        argv: names of the programs to choose from, separated by commas, then the command line; `sys.argv[1:]` if None.
    """
    names, *line = sys.argv[1:] if argv is None else argv
    options, flags = split_launcher_flags(line)
    with exit_on_invalid_argument():
        module = choose(names.split(","), flags)
    if not options:
        sys.argv[1:] = flags
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    groups = groups_of(module)
    with exit_on_invalid_argument(*groups):
        parse(*groups, args=flags, description=sys.modules[module].__doc__)
        words = launcher_words(options)
    launch([*words, str(ROOT / f"{module}.py"), *flags])


def split_launcher_flags(line: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """({the launcher's flags with underscores and without hyphens before them: value, None for a switch}, the rest)."""
    options: dict[str, str | None] = {}
    others, rest = list[str](), list(line)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        if name in SWITCHES:
            options[name] = None
        elif name in WITH_VALUE or name.startswith(_FSDP):
            options[name] = value if equals or not rest else rest.pop(0)
        else:
            others.append(word)
    return options, others


def choose(names: Sequence[str], line: Sequence[str]) -> str:
    """The program that has a given flag, or a key of the --config file, that the other programs lack.

    The first program if there is no such flag. Raises `InvalidArgument` if there are such flags of several programs.
    """
    if len(names) == 1:
        return names[0]
    groups = {name: groups_of(name) for name in names}
    given = {name: given_fields(line, of_name) & _own(name, groups) for name, of_name in groups.items()}
    found = [name for name in names if given[name]]
    if len(found) > 1:
        one, other = (f"--{min(given[name])}" for name in found[:2])
        refuse(one, HIDDEN, f"belongs to another program than {other}; give one of them")
    return found[0] if found else names[0]


def groups_of(name: str) -> tuple[type, ...]:
    """The dataclasses of a program's flags. Imports the program, which loads no heavy library before it runs."""
    groups: tuple[type, ...] = pkgutil.resolve_name(f"{name}:GROUPS")
    return groups


def _own(name: str, groups: dict[str, tuple[type, ...]]) -> set[str]:
    """The fields that only one of several programs has."""
    fields = {one: set(canonical(of_one)) for one, of_one in groups.items()}
    return fields[name].difference(*(others for one, others in fields.items() if one != name))


def launcher_words(options: dict[str, str | None]) -> list[str]:
    """The words after `accelerate launch` for the launcher's flags.

    Without --config_file this is the shipped configuration that shards nothing, with --mixed_precision no, as in a run
    without the launcher. A configuration is found by its path, or by its path from the repository's root.

    Raises:
        InvalidArgument: no such configuration, or a count that is no number.
    """
    import yaml

    if "config_file" not in options:
        plain: dict[str, str | None] = {"config_file": PLAIN_CONFIG, "mixed_precision": "no"}
        options = plain | options
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_port", "num_cpu_threads_per_process"):
        if name in options and not str(options[name]).isdecimal():
            refuse(f"--{name}", options[name], "give a whole number")
    config = _find_config(str(options["config_file"]))
    try:
        kind = yaml.safe_load(config.read_text(encoding="utf-8"))["distributed_type"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        refuse("--config_file", str(config), "is no launch configuration; `accelerate config` writes one")
    several = int(options.get("num_processes") or 1) > 1
    if several and kind in _UNSHARDED and "use_fsdp" not in options:
        options = options | {"multi_gpu": None}  # otherwise this configuration starts only one process
    words = {f"--{name}": value for name, value in (options | {"config_file": str(config)}).items()}
    return [word for flag, value in words.items() for word in (flag, value) if word is not None]


def _find_config(given: str) -> Path:
    """The launch configuration at a path, or at this path from the root."""
    found = next((path for path in (Path(given), ROOT / given) if path.is_file()), None)
    if found is None:
        shipped = ", ".join(sorted(f"accelerate_configs/{path.name}" for path in ROOT.glob("accelerate_configs/*.cfg")))
        refuse("--config_file", given, f"there is no such file; shipped are {shipped}")
    return found


def launch(words: Sequence[str]) -> None:
    """Start processes as `accelerate launch` does, and exit with the status of the first that fails.

    Args:
        words: the words after `accelerate launch`.
    """
    from accelerate.commands import launch as launcher
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher.simple_launcher = _become  # of one process; accelerate's would not pass signals on
    parser = launcher.launch_command_parser()
    parser.error = lambda message: exit_with(" ".join(message.split()))
    arguments = parser.parse_args(words)
    logging.disable(logging.ERROR)  # in this process only: the launcher's account of a failure
    try:
        launcher.launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not tell itself
            print(f"error: process {rank} was ended by signal {-failure.exitcode}", file=sys.stderr)
            raise SystemExit(_KILLED_BY - failure.exitcode) from None
        raise SystemExit(failure.exitcode) from None
    except SignalException as error:  # it was passed on, and the processes have ended
        raise SystemExit(_KILLED_BY + error.sigval) from None
    except ValueError as error:  # accelerate's word for flags that contradict each other
        exit_with(" ".join(str(error).split()))


def _become(arguments: Any) -> NoReturn:
    """Replace this process by the program, with the launcher's environment: signals and status need no passing on."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(arguments)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
