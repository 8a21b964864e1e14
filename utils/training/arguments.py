"""Flags of the training scripts: data, privacy, adapter, optimisation and output, each a titled group of --help."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from dptune._validate import refuse, require_count, require_positive
from dptune.clipping_styles import FLAT, Adaptive, Automatic, Clipping, PerLayer
from dptune.lora_targets import DEFAULT_TARGETS
from dptune.run.plan import PrivacySettings
from dptune.units.unit import EXAMPLE, UNIT_GRADIENTS, USER_LEVEL, USER_LEVEL_METHODS, PrivacyUnit
from utils.cli.flags import naming, refuse_unread
from utils.cli.trackers import REPORT_TO_CHOICES, choose_trackers
from utils.data.named_sets import DATASET_NAMES, FIRST_DAY, LAST_DAY
from utils.data.prompts import PROMPT_STYLES
from utils.models.arguments import ModelArguments
from utils.training.changes import OnResume, OnResumeTable
from utils.training.optimizers import OPTIMIZERS, UpdateSettings

CLIPPING_STYLES = ("flat", "per-layer", "automatic", "adaptive")
# Schedules of transformers.get_scheduler that need no extra setting.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# Flags that only a private run reads. The others of privacy also say what is drawn, so runs without privacy read them.
ONLY_PRIVATE = (
    "target_epsilon",
    "delta",
    "clipping",
    "layer_clip_norms",
    "automatic_gamma",
    "adaptive_quantile",
    "adaptive_learning_rate",
    "adaptive_count_noise",
)
# {parameter, as the engine and shared code name it: flag of train_clm.py}.
TRAINING_FLAGS = {
    **dict.fromkeys(("model", "folder", "files"), "--model_name_or_path"),
    "rank": "--lora_r",
    "alpha": "--lora_alpha",
    "dropout": "--lora_dropout",
    "targets": "--lora_target_modules",
    "clip_norms": "--layer_clip_norms",
    "group_size": "--examples_per_unit",
    "expected_batch_size": "--gradient_accumulation_steps",
    "run_folder": "--output_dir",
    "resume_from": "--resume_from_checkpoint",
    "keep": "--save_total_limit",
}


@dataclass
class DataArguments:
    """What to train on: exactly one of --dataset_name and --train_file."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": f"name of a built-in data set: {', '.join(DATASET_NAMES)} (see data/README.md)"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "instructions and answers: JSON, JSONL, CSV, Parquet or a saved DatasetDict"}
    )
    validation_file: str | None = field(
        default=None,
        metadata={"help": "held-out examples in the same formats; their measured loss is not private"},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder in which --dataset_name looks for its data; by default the project's data/"},
    )
    date_from: str = field(default=FIRST_DAY, metadata={"help": "first day to use of a --dataset_name with dates"})
    date_to: str = field(default=LAST_DAY, metadata={"help": "last day to use of a --dataset_name with dates"})
    block_size: int = field(default=512, metadata={"help": "maximum tokens per example; longer ones are cut"})
    prompt_style: str = field(
        default="plain", metadata={"help": "form of the prompt, see data/README.md", "choices": PROMPT_STYLES}
    )


@dataclass
class PrivacyFlags:
    """Everything that decides epsilon, together with the logical batch size and the number of steps."""

    _argument_group_name = "privacy"

    clip_norm: float = field(
        default=1.0,
        metadata={"help": "maximum gradient norm per example (or per author); see also --noise_multiplier"},
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "noise standard deviation / --clip_norm; set both flags to -1 to train without privacy"},
    )
    target_epsilon: float | None = field(
        default=None, metadata={"help": "epsilon to spend: finds the noise for it, instead of --noise_multiplier"}
    )
    delta: float = field(
        default=1e-7, metadata={"help": "chance that the epsilon bound fails; below 1 / number of examples (authors)"}
    )
    privacy_unit: str = field(
        default=EXAMPLE,
        metadata={"help": "what is protected: example (one row), or the column of each row's author (all their rows)"},
    )
    examples_per_unit: int | None = field(
        default=None, metadata={"help": "maximum examples per author, k (see --user_level_method)"}
    )
    user_level_method: str = field(
        default=USER_LEVEL,
        metadata={
            "help": "user-level: draw authors and clip the combined gradient of up to k of their examples; "
            "example-level: keep k examples per author, draw and clip single ones, and account for all k",
            "choices": USER_LEVEL_METHODS,
        },
    )
    unit_gradient: str = field(
        default="mean",
        metadata={"help": "combination of an author's gradients before clipping", "choices": UNIT_GRADIENTS},
    )
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect rows although a column names users: a user with many rows is protected less"},
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={"help": "FOR TESTS: seed of repeatable sampling and noise, which protect nobody; the report says so"},
    )

    def __post_init__(self) -> None:
        off = [self.clip_norm < 0, self.noise_multiplier is not None and self.noise_multiplier < 0]
        if any(off) and not all(off):
            remedy = f"--clip_norm is {self.clip_norm:g}; make both positive, or both -1 to train without privacy"
            refuse("--noise_multiplier", self.noise_multiplier, remedy)
        self.settings()
        self._check_unit()

    def settings(self, clipping: Clipping = FLAT) -> PrivacySettings | None:
        """The flags as the engine takes them; None if clipping and noise are turned off."""
        if self.clip_norm < 0:
            return None
        return PrivacySettings(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            clipping=clipping,
        )

    def _check_unit(self) -> None:
        k = self.examples_per_unit
        if self.privacy_unit == EXAMPLE:
            if k is not None:
                refuse("--examples_per_unit", k, "is for authors; name their column with --privacy_unit")
            return
        if self.ignore_users:
            refuse("--ignore_users", True, "contradicts --privacy_unit; leave one out")
        if not self.privacy_unit.strip():
            refuse("--privacy_unit", self.privacy_unit, "give `example`, or the column that names each row's author")
        if k is None:
            refuse("--examples_per_unit", k, "give the maximum examples per author, which --privacy_unit needs")
        require_count("--examples_per_unit", k)

    @property
    def users_flag(self) -> str | None:
        """The flag to recommend for a file that names users; None where such a file is taken."""
        protects_rows = self.clip_norm > 0 and self.privacy_unit == EXAMPLE
        return "--privacy_unit" if protects_rows and not self.ignore_users else None

    @property
    def unit(self) -> PrivacyUnit:
        """What is protected, and how."""
        if self.privacy_unit == EXAMPLE:
            return PrivacyUnit()
        return PrivacyUnit(self.privacy_unit, self.user_level_method, self.examples_per_unit or 1, self.unit_gradient)


@dataclass
class ClippingArguments:
    """How per-example gradients are clipped. In every style the noise is scaled by --clip_norm."""

    _argument_group_name = "clipping"

    clipping: str = field(
        default="flat",
        metadata={
            "help": "way to clip. flat: the whole gradient; per-layer: each layer's part; automatic: normalise every "
            "gradient; adaptive: the clip norm follows a private quantile of the norms",
            "choices": CLIPPING_STYLES,
        },
    )
    layer_clip_norms: list[str] | None = field(
        default=None,
        metadata={"help": "for per-layer: PATTERN=NORM for every trained layer; default: equal shares of --clip_norm"},
    )
    automatic_gamma: float = field(
        default=0.01, metadata={"help": "for automatic: a gradient g is scaled by clip_norm / (|g| + gamma)"}
    )
    adaptive_quantile: float = field(default=0.5, metadata={"help": "for adaptive: share of unclipped gradients"})
    adaptive_learning_rate: float = field(default=0.2, metadata={"help": "for adaptive: step size of log(clip norm)"})
    adaptive_count_noise: float | None = field(
        default=None,
        metadata={"help": "for adaptive: noise on the unclipped gradients' count; default: expected batch / 20"},
    )

    def __post_init__(self) -> None:
        if self.layer_clip_norms is not None and self.clipping != "per-layer":
            refuse("--layer_clip_norms", self.layer_clip_norms[0], "needs --clipping per-layer")

    def style(self, layers: Iterable[str]) -> Clipping:
        """The clipping style for a model with these trained layers."""
        if self.clipping == "per-layer":
            return PerLayer(
                None if self.layer_clip_norms is None else _by_layer(self.layer_clip_norms, sorted(set(layers)))
            )
        flags = {"gamma": "--automatic_gamma"}
        flags |= {name: f"--adaptive_{name}" for name in ("quantile", "learning_rate", "count_noise")}
        with naming(flags):
            if self.clipping == "automatic":
                return Automatic(self.automatic_gamma)
            if self.clipping == "adaptive":
                return Adaptive(self.adaptive_quantile, self.adaptive_learning_rate, self.adaptive_count_noise)
        return FLAT


def _by_layer(given: Sequence[str], layers: Sequence[str]) -> dict[str, float]:
    """{layer: clip norm} from PATTERN=NORM entries. A later pattern wins; every layer must match one."""
    found: dict[str, float] = {}
    for entry in given:
        pattern, _, norm = entry.rpartition("=")
        try:
            value = float(norm)
        except ValueError:
            refuse("--layer_clip_norms", entry, "give PATTERN=NORM, such as *.attn.*=0.5")
        matching = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if not matching:
            refuse("--layer_clip_norms", entry, f"matches no trained layer; their names are like {layers[0]}")
        found |= dict.fromkeys(matching, value)
    if missing := [layer for layer in layers if layer not in found]:
        refuse("--layer_clip_norms", given[-1], f"leaves out {len(missing)} trained layers such as {missing[0]}")
    return found


@dataclass
class LoraArguments:
    """What is trained: adapters, or parameters of the model itself."""

    _argument_group_name = "what is trained"

    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "train the model's own parameters instead of LoRA adapters: all, biases, norms, or patterns of "
            "parameter names such as *.attn.*; saves the whole model; default: train adapters"
        },
    )

    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "scaling: adapter outputs are multiplied by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout probability of the adapters' inputs"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={
            "help": "names, name endings or patterns (*.language_model.*.q_proj) of the linear layers to adapt; "
            "lm_head too"
        },
    )


@dataclass
class OptimizationArguments:
    """Batch, steps and optimizer. Memory does not grow with the logical batch."""

    _argument_group_name = "optimisation"

    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "examples of --block_size tokens that fit on a device at a time"}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "average examples per step / (processes x --per_device_train_batch_size)"}
    )
    max_tokens_per_device: int | None = field(
        default=None,
        metadata={"help": "maximum padded tokens per forward pass; default: per-device batch x block size"},
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "average number of passes over the data"})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "steps to train, instead of --num_train_epochs"}
    )
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "dp-adam is AdamW with the noise variance subtracted from the second moment",
            "choices": OPTIMIZERS,
        },
    )
    momentum: float = field(default=0.0, metadata={"help": "momentum of --optimizer sgd"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay on the trained parameters"})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "schedule of the learning rate", "choices": LR_SCHEDULERS}
    )
    num_warmup_steps: int = field(default=0, metadata={"help": "steps in which the learning rate rises from 0"})
    gradient_sync: str = field(
        default="gather",
        metadata={
            "help": "sum of gradients over processes: gather has a fixed order; reduce sends less with many processes",
            "choices": ("gather", "reduce"),
        },
    )
    gradient_ckpt: bool = field(
        default=False, metadata={"help": "recompute activations: less memory, about a third more time"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the adapters' start; sampling and noise ignore it"})

    @property
    def sync(self) -> Literal["gather", "reduce"]:
        """How gradients are added over ranks, as the engine names it."""
        return "reduce" if self.gradient_sync == "reduce" else "gather"

    @property
    def updates(self) -> UpdateSettings:
        """The optimizer and its schedule."""
        return UpdateSettings(
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr_scheduler_type=self.lr_scheduler_type,
            num_warmup_steps=self.num_warmup_steps,
        )

    def __post_init__(self) -> None:
        require_count("--per_device_train_batch_size", self.per_device_train_batch_size)
        require_count("--gradient_accumulation_steps", self.gradient_accumulation_steps)
        require_positive("--num_train_epochs", self.num_train_epochs)
        require_positive("--learning_rate", self.learning_rate)
        require_count("--num_warmup_steps", self.num_warmup_steps, minimum=0)
        if self.max_train_steps is not None:
            require_count("--max_train_steps", self.max_train_steps)
        if self.max_tokens_per_device is not None:
            require_count("--max_tokens_per_device", self.max_tokens_per_device)
        if not 0 <= self.momentum < 1:
            refuse("--momentum", self.momentum, "give a number in [0, 1)")
        if self.momentum and self.optimizer != "sgd":
            refuse("--momentum", self.momentum, f"belongs to --optimizer sgd, not {self.optimizer}")
        if not 0 <= self.weight_decay < math.inf:
            refuse("--weight_decay", self.weight_decay, "give a number of at least 0")


@dataclass
class OutputArguments:
    """Where results go and what is shown."""

    _argument_group_name = "output"

    output_dir: str = field(metadata={"help": "new folder for weights, privacy report and diagnostics"})
    checkpointing_steps: int = field(default=10, metadata={"help": "steps between checkpoints; 0 writes none"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep; older ones are deleted"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "checkpoint in --output_dir, or latest: the newest, or a new run if there is none"},
    )
    eval_freq: int = field(default=10, metadata={"help": "steps between measurements of the held-out loss"})
    eval_at_start: bool = field(default=True, metadata={"help": "measure the held-out loss before the first step too"})
    with_tracking: bool = field(
        default=False, metadata={"help": "write TensorBoard files, which are not private, to --output_dir"}
    )
    report_to: str | None = field(
        default=None,
        metadata={"help": "tracker for the metrics (not private); all: all installed", "choices": REPORT_TO_CHOICES},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print epsilon, noise, steps and memory, then stop without training"}
    )

    def __post_init__(self) -> None:
        require_count("--eval_freq", self.eval_freq)
        require_count("--checkpointing_steps", self.checkpointing_steps, minimum=0)
        if self.save_total_limit is not None:
            require_count("--save_total_limit", self.save_total_limit)
        _ = self.trackers

    @property
    def trackers(self) -> list[str]:
        """The trackers that receive metrics."""
        return choose_trackers(self.report_to, with_tracking=self.with_tracking)


class Groups(NamedTuple):
    """All flags of train_clm.py, in the order of --help."""

    model: ModelArguments
    data: DataArguments
    privacy: PrivacyFlags
    clipping: ClippingArguments
    lora: LoraArguments
    optimization: OptimizationArguments
    output: OutputArguments

    def refuse_unread(self, given: Collection[str]) -> None:
        """Refuse flags of privacy, among those that were `given`, if privacy is turned off."""
        if self.privacy.settings() is None:
            remedy = "is not read without privacy: leave it out, or give --clip_norm and --noise_multiplier above 0"
            refuse_unread(given, ONLY_PRIVATE, remedy, *self)


CAUSAL_LM_GROUPS = (
    ModelArguments,
    DataArguments,
    PrivacyFlags,
    ClippingArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
)

# What a resumed run does about a changed flag. Every flag has a class.
ON_RESUME: OnResumeTable = {
    # the model
    "model_name_or_path": OnResume.COMPARED,
    "revision": OnResume.COMPARED,
    "qbits": OnResume.REFUSED,
    "access_token": OnResume.RUNTIME,
    # the data; tokens and labels are compared
    "dataset_name": OnResume.COMPARED,
    "train_file": OnResume.COMPARED,
    "validation_file": OnResume.EFFECTIVE,
    "data_dir": OnResume.COMPARED,
    "date_from": OnResume.COMPARED,
    "date_to": OnResume.COMPARED,
    "block_size": OnResume.COMPARED,
    "prompt_style": OnResume.REFUSED,
    # privacy
    "clip_norm": OnResume.REFUSED,
    "noise_multiplier": OnResume.REFUSED,
    "target_epsilon": OnResume.REFUSED,
    "delta": OnResume.REFUSED,
    "privacy_unit": OnResume.REFUSED,
    "examples_per_unit": OnResume.REFUSED,
    "user_level_method": OnResume.REFUSED,
    "unit_gradient": OnResume.REFUSED,
    "insecure_test_seed": OnResume.REFUSED,
    "ignore_users": OnResume.RUNTIME,
    "clipping": OnResume.REFUSED,
    "layer_clip_norms": OnResume.COMPARED,
    "automatic_gamma": OnResume.REFUSED,
    "adaptive_quantile": OnResume.REFUSED,
    "adaptive_learning_rate": OnResume.REFUSED,
    "adaptive_count_noise": OnResume.REFUSED,
    # what is trained
    "trainable": OnResume.REFUSED,
    "lora_r": OnResume.REFUSED,
    "lora_alpha": OnResume.REFUSED,
    "lora_dropout": OnResume.EFFECTIVE,
    "lora_target_modules": OnResume.COMPARED,
    # optimisation
    "per_device_train_batch_size": OnResume.COMPARED,
    "gradient_accumulation_steps": OnResume.COMPARED,
    "max_tokens_per_device": OnResume.RUNTIME,
    "num_train_epochs": OnResume.EFFECTIVE,
    "max_train_steps": OnResume.EFFECTIVE,
    "optimizer": OnResume.REFUSED,
    "momentum": OnResume.EFFECTIVE,
    "learning_rate": OnResume.EFFECTIVE,
    "weight_decay": OnResume.EFFECTIVE,
    "lr_scheduler_type": OnResume.EFFECTIVE,
    "num_warmup_steps": OnResume.EFFECTIVE,
    "gradient_sync": OnResume.RUNTIME,
    "gradient_ckpt": OnResume.RUNTIME,
    "seed": OnResume.REFUSED,
    # output
    "output_dir": OnResume.RUNTIME,
    "checkpointing_steps": OnResume.RUNTIME,
    "save_total_limit": OnResume.RUNTIME,
    "resume_from_checkpoint": OnResume.RUNTIME,
    "eval_freq": OnResume.RUNTIME,
    "eval_at_start": OnResume.RUNTIME,
    "with_tracking": OnResume.RUNTIME,
    "report_to": OnResume.RUNTIME,
    "dry_run": OnResume.RUNTIME,
}
