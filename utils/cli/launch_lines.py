"""`accelerate launch` commands, as words to run and as a line to copy."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dptune._validate import refuse, require_count
from utils.cli.parser import CONFIG_FLAG
from utils.cli.settings_file import split_config

PLAIN_CONFIG = "accelerate_configs/accelerate_config_nofsdp.cfg"
SHARDED_CONFIG = "accelerate_configs/accelerate_config.cfg"
_SECRET = re.compile("(^|_)(token|key|password|secret)$")  # secret flags, also ones that the scripts do not have


def launch_words(script: str, flags: Sequence[str], *, gpus: int, shard: bool) -> list[str]:
    """The words after `accelerate launch`.

    Args:
        script: path from the repository's root.
        flags: the script's flags.
        gpus: number of processes, one per GPU; without GPUs they run on the CPU.
        shard: shard frozen weights over the GPUs instead of holding all of them on each.
    """
    words = ["--config_file", SHARDED_CONFIG if shard else PLAIN_CONFIG, "--num_processes", str(gpus)]
    if gpus > 1 and not shard:
        words.append("--multi_gpu")  # otherwise the plain configuration starts only one process
    return [*words, script, *flags]


def as_line(words: Sequence[str]) -> str:
    """The command as a line to copy, quoted for a POSIX shell."""
    return f"accelerate launch {shlex.join(words)}"


def as_command(words: Sequence[str]) -> list[str]:
    """The same command with this interpreter, which does not need `accelerate` on the path."""
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def require_job(job_sess: str, outputs: Path, *, gpus: int, shard: bool) -> None:
    """Check what all jobs have: a name, which becomes a folder in `outputs`, and how many GPUs share the model."""
    require_count("--gpus", gpus)
    if Path(job_sess).name != job_sess or job_sess in ("", ".."):
        refuse("--job_sess", job_sess, f"give the name of a folder in {outputs}, without slashes")
    if shard and gpus == 1:
        refuse("--shard", True, "shards the model over several GPUs; give --gpus 2 or more, or leave it out")


def require_not_taken(extra: Sequence[str], taken: Mapping[str, str]) -> None:
    """Refuse flags after `--` that a job's own flags decide, and secrets, since the line is printed.

    Args:
        extra: the words after `--`.
        taken: {name of the launched script's flag: the job's flag}.
    """
    for word in extra:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and _SECRET.search(name):
            refuse(f"--{name}", "after --", "would be printed with the line; set HF_TOKEN in the environment instead")
        if word.startswith("--") and name in taken:
            refuse(f"--{name}", "after --", f"give {taken[name]} before -- instead")


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words before the first `--`, which are this program's; words after it, which are the trainer's).

    Raises `InvalidArgument` for a --config after it: its file might hold flags that the program must see.
    """
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    own, extra = words[:place], words[place + 1 :]
    if split_config(extra)[0]:
        refuse(CONFIG_FLAG, "after --", "may hold flags that this program sets; give single flags there")
    return own, extra
