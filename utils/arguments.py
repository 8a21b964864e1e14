"""Command lines of the scripts: dataclasses in, one line and exit status 2 out when something is wrong.

Every script parses with `parse` and runs inside `exit_on_invalid_argument`. A field declared with `repr=False` is a
secret: it is left out of `repr`, of `public_config` and, once parsed, of `sys.argv` (trackers record the command line).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser

from dptune._validate import InvalidArgument, refuse, require_count, require_positive, require_probability
from utils.endpoints import VLLM_KEY, require_address
from utils.prompts import PROMPT_STYLES
from utils.quantization import BITS, require_available

BACKENDS = ("hf", "continuous", "vllm")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Seconds another rank gives the main process to print the same mistake, and the launcher to end all ranks after it.
_MAIN_PROCESS_FIRST = 3.0


@dataclass
class ModelArguments:
    """Which model to load, and the key to it."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "folder or hub name of the model and its tokenizer"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    qbits: int = field(
        default=16,
        metadata={"help": "bits of the frozen weights; 4 and 8 need bitsandbytes and no sharding", "choices": BITS},
    )
    access_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "token for gated models on the hub; better in the environment variable HF_TOKEN"},
    )

    def __post_init__(self) -> None:
        # Read here, not as the field's default: argparse prints defaults in --help.
        self.access_token = self.access_token or os.environ.get("HF_TOKEN") or None
        require_available(self.qbits)

    @property
    def hub(self) -> dict[str, str | None]:
        """What the hub's client is told beside the name."""
        return {"token": self.access_token, "revision": self.revision}


@dataclass
class AdapterArguments:
    """Which adapter to sample with."""

    _argument_group_name = "adapter"

    lora_weights_path: str | None = field(
        default=None,
        metadata={"help": "lora_weights.bin or a PEFT adapter folder; without it the base model itself is sampled"},
    )
    merge_lora: bool = field(
        default=True, metadata={"help": "add the adapter to the base weights: samples faster, rounds in bf16"}
    )


@dataclass
class SamplingArguments:
    """How texts are drawn and where they go. Lengths are in tokens."""

    _argument_group_name = "sampling"

    output_dir: str = field(
        metadata={"help": "folder for generations.jsonl; a run that was interrupted continues in it"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens of the prompt and the generated text together"})
    batch_size: int = field(default=8, metadata={"help": "texts drawn at once on each device, or asked for at once"})
    temperature: float = field(
        default=1.0, metadata={"help": "divides the logits; 0 takes the likeliest token (greedy)"}
    )
    top_k: int = field(default=50, metadata={"help": "draw among the k likeliest tokens; 0 among all"})
    top_p: float = field(
        default=0.9, metadata={"help": "draw among the likeliest tokens that hold this mass; 1 among all"}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1 makes repeated tokens less likely; 1 is off"}
    )
    seed: int = field(default=0, metadata={"help": "same seed and batch size, same texts; change it for other texts"})
    prompt_style: str = field(
        default="plain",
        metadata={"help": "how an instruction becomes a prompt: the style used in training", "choices": PROMPT_STYLES},
    )
    stop: list[str] | None = field(
        default=None, metadata={"help": "strings before which a text is cut; it has then ended by itself"}
    )
    deduplicate: bool = field(
        default=False,
        metadata={
            "help": "write instructions.jsonl: the texts that ended by themselves, no blank ones and none twice; "
            "always so with --prompt_style uncond_generation"
        },
    )
    backend: str = field(
        default="hf",
        metadata={
            "help": "what draws: hf in batches, continuous in batches that a new text enters as soon as one ends, "
            "vllm by the OpenAI-compatible server at --vllm_url",
            "choices": BACKENDS,
        },
    )
    vllm_url: str | None = field(
        default=None, metadata={"help": "such as http://localhost:8000/v1; its key is read from VLLM_API_KEY"}
    )
    vllm_model: str | None = field(
        default=None, metadata={"help": "name of the model or adapter on that server; needed if it has several"}
    )

    def __post_init__(self) -> None:
        require_count("--max_length", self.max_length, minimum=2)
        require_count("--batch_size", self.batch_size)
        require_count("--top_k", self.top_k, minimum=0)
        require_probability("--top_p", self.top_p)
        require_positive("--repetition_penalty", self.repetition_penalty)
        if self.temperature != 0:
            require_positive("--temperature", self.temperature)
        if self.stop is not None and not all(self.stop):
            refuse("--stop", self.stop, "an empty string would stop every text at once; leave it out")
        self._require_backend()

    def _require_backend(self) -> None:
        """What the backend cannot do, and flags of another one."""
        if self.backend == "continuous" and self.repetition_penalty != 1:
            refuse("--repetition_penalty", self.repetition_penalty, "--backend continuous has none; give 1, or hf")
        if self.backend == "vllm" and self.vllm_url is None:
            refuse("--backend", "vllm", "name its server by --vllm_url, such as http://localhost:8000/v1")
        if self.vllm_url is not None:
            require_address(self.vllm_url, flag="--vllm_url", key_variable=VLLM_KEY)
        for name in ("vllm_url", "vllm_model"):
            if self.backend != "vllm" and getattr(self, name) is not None:
                refuse(f"--{name}", getattr(self, name), "is for --backend vllm; give that too, or leave it out")


def parse(*dataclass_types: type, args: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """One filled instance of each dataclass, in order.

    Args:
        dataclass_types: dataclasses whose fields become flags; a class attribute `_argument_group_name` titles them.
        args: the command line without the program's name; `sys.argv[1:]` if None, where secrets are then overwritten.
        description: what --help prints above the flags; line breaks are kept.

    Exits with status 2 and one line for an unknown, missing or malformed flag. Abbreviated flags are unknown: they
    would change their meaning when a flag is added. Raises `InvalidArgument` where a dataclass refuses a value.
    """
    parser = _OneLineParser(
        dataclass_types, description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    # A file next to the script named like it is not read: what ran should be what the command line says.
    *filled, unknown = parser.parse_args_into_dataclasses(
        args=args, return_remaining_strings=True, look_for_args_file=False
    )
    if args is None:
        _overwrite_secrets(sys.argv, dataclass_types)
    if unknown:
        parser.error(_describe_unknown(unknown, dataclass_types))
    return tuple(filled)


def public_config(*instances: Any) -> dict[str, Any]:
    """The fields of all instances in one flat dict, secrets (`repr=False`) left out: fit for saving and logging."""
    return {f.name: getattr(one, f.name) for one in instances for f in dataclasses.fields(one) if f.repr}


@contextmanager
def exit_on_invalid_argument() -> Iterator[None]:
    """Turn an `InvalidArgument` raised inside, or a full disk, into one line on stderr and exit status 2.

    Also a decorator: `@exit_on_invalid_argument()`. On several ranks the main process alone prints, unless the mistake
    is seen on another rank only.
    """
    try:
        yield
    except InvalidArgument as error:
        _exit_with(str(error))
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        _exit_with(
            f"{error.strerror}: {error.filename or 'a file'} is not written; free space, then run the line again"
        )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown where there is one, line breaks of the description kept."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[0].startswith("--no_"):  # the parser gives it the help of the flag that it turns off
            return f"turns off --{action.dest}"
        return action.help if action.default is None else super()._get_help_string(action)


class _OneLineParser(HfArgumentParser):
    """Prints a mistake alone, without the usage of all flags around it."""

    def error(self, message: str) -> NoReturn:
        _exit_with(f"{' '.join(message.split())} (--help lists the flags)")


def _exit_with(message: str) -> NoReturn:
    """Print `error: message` and exit with status 2; ranks other than the first let the first speak."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # When rank 0 fails too, the launcher ends this process while it sleeps; exiting first could end rank 0 unheard.
        time.sleep(_MAIN_PROCESS_FIRST)
        print(f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _flags(dataclass_types: Sequence[type], *, secret_only: bool = False) -> list[str]:
    """All flags, or those of secrets, as the parser spells them (with underscores and with hyphens)."""
    names = [f.name for one in dataclass_types for f in dataclasses.fields(one) if not (secret_only and f.repr)]
    return [f"--{spelling}" for name in names for spelling in (name, name.replace("_", "-"))]


def _overwrite_secrets(argv: list[str], dataclass_types: Sequence[type]) -> None:
    """Replace the values of secret flags in `argv`, in place."""
    secret = set(_flags(dataclass_types, secret_only=True))
    for position, word in enumerate(argv):
        flag, equals, _ = word.partition("=")
        if flag in secret and equals:
            argv[position] = f"{flag}=***"
        elif flag in secret and position + 1 < len(argv):
            argv[position + 1] = "***"


def _describe_unknown(unknown: Sequence[str], dataclass_types: Sequence[type]) -> str:
    """Name unknown flags without their values: a misspelt --access_token must not print the token."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    if not flags:
        return f"{len(unknown)} value(s) that belong to no flag; quote a value that holds spaces"
    close = [difflib.get_close_matches(flag, _flags(dataclass_types), n=1) for flag in flags]
    hints = [f"{flag} (did you mean {near[0]}?)" if near else flag for flag, near in zip(flags, close, strict=True)]
    return f"unknown flag: {', '.join(hints)}"
