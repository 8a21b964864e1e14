"""`accelerate launch` lines: which configuration and how many processes, as words for a process and as text to copy."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dptune._validate import refuse, require_count

PLAIN_CONFIG = "accelerate_configs/accelerate_config_nofsdp.cfg"
SHARDED_CONFIG = "accelerate_configs/accelerate_config.cfg"
_SECRET = re.compile(
    "(^|_)(token|key|password|secret)$"
)  # flags that the scripts have, or that one may think they have


def launch_words(script: str, flags: Sequence[str], *, gpus: int, shard: bool) -> list[str]:
    """The words behind `accelerate launch`.

    Args:
        script: path from the repository's root.
        flags: the script's own.
        gpus: processes, one a GPU; a machine without GPUs runs them on its CPU.
        shard: spread frozen weights over the GPUs instead of holding all of them on each.
    """
    words = ["--config_file", SHARDED_CONFIG if shard else PLAIN_CONFIG, "--num_processes", str(gpus)]
    if gpus > 1 and not shard:
        words.append("--multi_gpu")  # the plain configuration starts one process, whatever the number says
    return [*words, script, *flags]


def as_line(words: Sequence[str]) -> str:
    """The line to copy, quoted for a POSIX shell."""
    return f"accelerate launch {shlex.join(words)}"


def as_command(words: Sequence[str]) -> list[str]:
    """The same launch with this interpreter, whether or not `accelerate` is on the path."""
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def require_job(job_sess: str, outputs: Path, *, gpus: int, shard: bool) -> None:
    """Check what all jobs have: a name that is a folder's within `outputs`, and how many GPUs share the model."""
    require_count("--gpus", gpus)
    if Path(job_sess).name != job_sess or job_sess in ("", ".."):
        refuse("--job_sess", job_sess, f"give a name for a folder within {outputs}, without slashes")
    if shard and gpus == 1:
        refuse("--shard", True, "spreads the model over several GPUs; give --gpus 2 or more, or leave it out")


def require_not_taken(extra: Sequence[str], taken: Mapping[str, str]) -> None:
    """Refuse flags behind `--` that a job's own flags decide: {name of the launched script's flag: the job's flag}.

    Secrets too, for the line is printed.
    """
    for word in extra:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and _SECRET.search(name):
            refuse(f"--{name}", "behind --", "would be printed with the line; set HF_TOKEN in the environment instead")
        if word.startswith("--") and name in taken:
            refuse(f"--{name}", "behind --", f"give {taken[name]} before -- instead")


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(this program's words, the trainer's), which `--` divides."""
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]
