"""A stand-in for `train_classifier.py` in tests of trials: it trains nothing and writes the same files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dptune.accounting import epsilon, planned_steps

TRAIN, VALIDATION = 1000, 200
MEASURED = 7.0  # the clip norm if none is given
PARAMETERS = {"full": 1_000_000, "lora": 8_000, "ia3": 4_000, "last-layer": 130}


class Ran(NamedTuple):
    """The settings of a training; no clip norm without privacy."""

    mode: str
    rate: float
    seed: int
    clip_norm: float | None


Accuracy = Callable[[Ran], float]  # on the validation split


class Trainer:
    """A `utils.comparison.trials.Runner` that records its calls."""

    def __init__(self, accuracy: Accuracy, *, stop_after: int | None = None, **changed: Any) -> None:
        self.commands: list[dict[str, str]] = []
        self.found: list[bool] = []  # whether the folder of an earlier attempt existed
        self.accuracy, self.stop_after, self.changed = accuracy, stop_after, changed

    def __call__(self, command: Sequence[str], log: Path) -> int:
        flags = flags_of(command)
        if self.stop_after is not None and len(self.commands) == self.stop_after:
            folder = Path(flags["output_dir"]) / flags["datasets"]
            folder.mkdir(parents=True)
            (folder / "half").write_text("")
            log.write_text("some lines\nerror: the machine went away\n")
            return 3
        self.commands.append(flags)
        log.write_text("trained\n")
        self.leave(flags)
        return 0

    def leave(self, flags: dict[str, str]) -> None:
        """The files of a finished training."""
        folder = Path(flags["output_dir"]) / flags["datasets"]
        self.found.append(folder.exists())
        (folder / "publish").mkdir(parents=True)
        (folder / "publish" / "model.safetensors").write_text(f"{flags['finetune_mode']} {flags['learning_rate']}")
        (folder / "publish" / "privacy_report.json").write_text('{"epsilon": "of one run"}')
        private, batch = "enable_dp" in flags, int(flags["batch_size"])
        steps = planned_steps(num_examples=TRAIN, expected_batch_size=batch, epochs=float(flags["num_train_epochs"]))
        sigma = float(flags.get("noise_multiplier", 0.8)) * self.changed.get("noise_factor", 1.0)
        mode, rate, seed = flags["finetune_mode"], float(flags["learning_rate"]), int(flags["seed"])
        clip_norm = float(flags.get("clip_norm", MEASURED)) if private else None
        accuracy = self.accuracy(Ran(mode, rate, seed, clip_norm))
        if private:
            lines = [
                json.dumps({"step": step + 1, "noise_multiplier": sigma, "sampling_probability": batch / TRAIN})
                for step in range(steps + self.changed.get("more_steps", 0))
            ]
            (folder / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
        results = {
            "task": flags["datasets"], "mode": mode, "private": private, "seed": seed, "learning_rate": rate,
            "epsilon": _epsilon(sigma, batch / TRAIN, steps) if private else None, "delta": 1e-6 if private else None,
            "clip_norm": clip_norm, "seconds": 1.0,
            "noise_multiplier": sigma if private else None, "trained_parameters": PARAMETERS[mode], "steps": steps,
            "expected_batch_size": batch, "train_examples": TRAIN, "majority": {"validation": 0.51},
            "scores": {"validation": {"accuracy": accuracy}},
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results | self.changed.get("results", {})))


@cache
def _epsilon(sigma: float, q: float, steps: int) -> float:
    return epsilon(noise_multiplier=sigma, sampling_probability=q, steps=steps, delta=1e-6)


def flags_of(command: Sequence[str]) -> dict[str, str]:
    """A command line as {flag: value}; a flag without a value has an empty one."""
    assert command[1].endswith("train_classifier.py"), command
    flags: dict[str, str] = {}
    for word in command[2:]:
        if word.startswith("--"):
            flags[name := word.removeprefix("--")] = ""
        else:
            flags[name] = word
    return flags
