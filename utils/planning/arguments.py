"""Flags of the planner: the data, the model, the time, the privacy, and the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._aliases import aliases
from dptune._validate import refuse, require_count, require_delta, require_positive
from utils.files.folders import require_new_file
from utils.models.known_devices import KNOWN, Device, find_device


@dataclass
class PlannerArguments:
    """What you have (rows, model, time, machine), and the epsilon that you want."""

    _argument_group_name = "planner"

    num_examples: int = field(metadata={"help": "number of training rows"})
    tokens_per_example: float = field(metadata={"help": "average number of tokens per row"})
    model_name_or_path: str = field(
        metadata={
            "help": "the model: a folder, a hub name or a GGUF file; a config.json alone is enough",
            "aliases": aliases("model"),
        }
    )
    hours: float = field(metadata={"help": "how long the training may take"})
    target_epsilon: float = field(metadata={"help": "epsilon to spend"})
    delta: float | None = field(
        default=None,
        metadata={
            "help": "chance that the epsilon bound fails; default: a tenth of 1 / number of rows, rounded down to a "
            "power of ten"
        },
    )
    tokens_per_second: float | None = field(
        default=None,
        metadata={
            "help": "speed of private training that you measured, over all processes: `tokens` divided by `seconds` "
            "in a run's diagnostics.jsonl; default: estimated for --for_device"
        },
    )
    for_device: str | None = field(
        default=None,
        metadata={
            "help": f"device to train on: {', '.join(one.name for one in KNOWN)}, or any name with its memory, such as "
            "'my card 24GB', which needs --tokens_per_second; default: unknown, so memory is not checked"
        },
    )
    for_devices: int | None = field(
        default=None, metadata={"help": "number of these devices, with one process each; default: 1"}
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "maximum tokens per row; longer ones are cut; default: a multiple of 64, at least twice "
            "--tokens_per_example, as far as the model's context allows"
        },
    )
    train_file: str = field(default="my.jsonl", metadata={"help": "training rows, for the printed line only"})
    output_dir: str = field(default="out", metadata={"help": "folder of the run, for the printed line only"})
    plot: str | None = field(
        default=None,
        metadata={
            "help": "PNG file to write: noise relative to the signal, by hours of training, for epsilon 1, 3 and 8; "
            "default: none"
        },
    )

    def __post_init__(self) -> None:
        require_count("--num_examples", self.num_examples, minimum=2)
        for name in ("tokens_per_example", "hours", "target_epsilon"):
            require_positive(f"--{name}", getattr(self, name))
        if self.delta is not None:
            require_delta(self.delta, self.num_examples, name="--delta")
        if self.block_size is not None:
            require_count("--block_size", self.block_size)
        require_new_file(self.plot, "--plot", ".png")
        if self.for_devices is not None:
            require_count("--for_devices", self.for_devices)
            if self.for_device is None:
                refuse("--for_devices", self.for_devices, "needs --for_device, which names the device; give that too")
        self._check_speed()

    def _check_speed(self) -> None:
        device = self.device
        if self.tokens_per_second is not None:
            require_positive("--tokens_per_second", self.tokens_per_second)
        elif device is None:
            told = "the speed is needed; give what you measured, or --for_device for an estimate"
            refuse("--tokens_per_second", None, told)
        elif device.peak is None:
            refuse("--for_device", self.for_device, "its speed is not known; give --tokens_per_second too")

    @property
    def device(self) -> Device | None:
        """The device of --for_device."""
        return None if self.for_device is None else find_device(self.for_device)

    @property
    def processes(self) -> int:
        """How many processes train, one on each device."""
        return self.for_devices or 1
