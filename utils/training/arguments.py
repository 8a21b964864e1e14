"""Flags of the training scripts: data, privacy, adapter, optimisation and output, each a titled group of --help."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from dptune._validate import refuse, require_count, require_positive
from dptune.clipping_styles import FLAT, Adaptive, Automatic, Clipping, PerLayer
from dptune.lora_targets import DEFAULT_TARGETS
from dptune.run.plan import PrivacySettings
from dptune.units.unit import EXAMPLE, UNIT_GRADIENTS, USER_LEVEL, USER_LEVEL_METHODS, PrivacyUnit
from utils.cli.flags import naming
from utils.cli.trackers import REPORT_TO_CHOICES, choose_trackers
from utils.data.named_sets import DATA_DIR, DATASET_NAMES, FIRST_DAY, LAST_DAY
from utils.data.prompts import PROMPT_STYLES
from utils.models.arguments import ModelArguments
from utils.training.optimizers import OPTIMIZERS, UpdateSettings

CLIPPING_STYLES = ("flat", "per-layer", "automatic", "adaptive")
# Those of transformers.get_scheduler that need no setting of their own.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# What the engine and shared code call the settings of train_clm.py.
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
        default=None, metadata={"help": f"a data set known by name: {', '.join(DATASET_NAMES)} (see data/README.md)"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "JSON, JSONL, CSV, Parquet or a saved DatasetDict with instruction and answer"}
    )
    validation_file: str | None = field(
        default=None,
        metadata={"help": "held-out examples in the same formats; their loss is a diagnostic, not private"},
    )
    data_dir: str = field(default=str(DATA_DIR), metadata={"help": "where --dataset_name looks for its folder"})
    date_from: str = field(default=FIRST_DAY, metadata={"help": "first day of a data set that has dates (ISO)"})
    date_to: str = field(default=LAST_DAY, metadata={"help": "last day of a data set that has dates (ISO)"})
    block_size: int = field(default=512, metadata={"help": "longest example in tokens; longer ones are cut"})
    prompt_style: str = field(
        default="plain", metadata={"help": "how an instruction becomes a prompt", "choices": PROMPT_STYLES}
    )


@dataclass
class PrivacyFlags:
    """Everything that decides epsilon, with the size of the logical batch and the number of steps."""

    _argument_group_name = "privacy"

    clip_norm: float = field(
        default=1.0,
        metadata={"help": "largest gradient norm of what is clipped as one; negative: no privacy (with the noise)"},
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "standard deviation of the noise over --clip_norm; negative: no privacy (with --clip_norm)"},
    )
    target_epsilon: float | None = field(
        default=None, metadata={"help": "find the noise multiplier for this epsilon instead"}
    )
    delta: float = field(
        default=1e-7, metadata={"help": "chance that the bound may fail; below 1 / number of examples (authors)"}
    )
    privacy_unit: str = field(
        default=EXAMPLE,
        metadata={"help": "whose presence is hidden: example (one row), or the column that names each row's author"},
    )
    examples_per_unit: int | None = field(
        default=None, metadata={"help": "k: most examples of an author (see --user_level_method)"}
    )
    user_level_method: str = field(
        default=USER_LEVEL,
        metadata={
            "help": "user-level: draw authors, clip what up to k of their examples add up to; example-level: keep k "
            "examples an author, draw and clip examples, account for all k",
            "choices": USER_LEVEL_METHODS,
        },
    )
    unit_gradient: str = field(
        default="mean",
        metadata={"help": "how an author's gradients are put together before clipping", "choices": UNIT_GRADIENTS},
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={"help": "FOR TESTS: repeatable sampling and noise, which protect nobody; the report says so"},
    )

    def __post_init__(self) -> None:
        off = [self.clip_norm < 0, self.noise_multiplier is not None and self.noise_multiplier < 0]
        if any(off) and not all(off):
            remedy = f"--clip_norm is {self.clip_norm:g}: privacy needs both above 0; no privacy is both negative"
            refuse("--noise_multiplier", self.noise_multiplier, remedy)
        self.settings()
        self._check_unit()

    def settings(self, clipping: Clipping = FLAT) -> PrivacySettings | None:
        """The same for the engine; None where clipping and noise are turned off."""
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
                refuse("--examples_per_unit", k, "says nothing about single rows; name a column with --privacy_unit")
            return
        if not self.privacy_unit.strip():
            refuse("--privacy_unit", self.privacy_unit, "give example, or the column that names each row's author")
        if k is None:
            refuse("--examples_per_unit", k, f"--privacy_unit {self.privacy_unit} needs it: most examples of an author")
        require_count("--examples_per_unit", k)

    @property
    def unit(self) -> PrivacyUnit:
        """What is protected, and how."""
        if self.privacy_unit == EXAMPLE:
            return PrivacyUnit()
        return PrivacyUnit(self.privacy_unit, self.user_level_method, self.examples_per_unit or 1, self.unit_gradient)


@dataclass
class ClippingArguments:
    """How per-example gradients are clipped; whatever the style, --clip_norm is what the noise is measured by."""

    _argument_group_name = "clipping"

    clipping: str = field(
        default="flat",
        metadata={
            "help": "flat: the whole gradient; per-layer: each layer's part; automatic: every gradient is normalised; "
            "adaptive: the clip norm follows a private quantile",
            "choices": CLIPPING_STYLES,
        },
    )
    layer_clip_norms: list[str] | None = field(
        default=None,
        metadata={
            "help": "per-layer: PATTERN=NORM for every trained layer, in the place of --clip_norm in equal shares"
        },
    )
    automatic_gamma: float = field(default=0.01, metadata={"help": "automatic: keeps tiny gradients tiny"})
    adaptive_quantile: float = field(default=0.5, metadata={"help": "adaptive: share of gradients left unclipped"})
    adaptive_learning_rate: float = field(default=0.2, metadata={"help": "adaptive: of the logarithm of the clip norm"})
    adaptive_count_noise: float | None = field(
        default=None, metadata={"help": "adaptive: noise on the number left unclipped; default: expected batch / 20"}
    )

    def __post_init__(self) -> None:
        if self.layer_clip_norms is not None and self.clipping != "per-layer":
            refuse("--layer_clip_norms", self.layer_clip_norms[0], "needs --clipping per-layer")

    def style(self, layers: Iterable[str]) -> Clipping:
        """The style for a model whose trained layers these are."""
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
    """{layer: clip norm} from PATTERN=NORM; a later pattern wins, and every layer must have one."""
    found: dict[str, float] = {}
    for entry in given:
        pattern, _, norm = entry.rpartition("=")
        try:
            value = float(norm)
        except ValueError:
            refuse("--layer_clip_norms", entry, "give PATTERN=NORM, such as *.attn.*=0.5")
        matching = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if not matching:
            refuse("--layer_clip_norms", entry, f"names no trained layer; they are called {layers[0]}, for example")
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
            "help": "train the model's own parameters in the place of adapters: all, biases, norms, or patterns for "
            "their names such as *.attn.*; the whole model is saved"
        },
    )

    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "the adapters' output is scaled by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "share of the adapters' inputs set to zero in training"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={"help": "names, or endings of names, of the linear layers to adapt; lm_head too"},
    )


@dataclass
class OptimizationArguments:
    """The expected logical batch is processes x per-device batch x accumulation steps; memory does not grow with it."""

    _argument_group_name = "optimisation"

    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "times --block_size: tokens that fit a device"}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "the expected logical batch over (processes x --per_device_train_batch_size)"}
    )
    max_tokens_per_device: int | None = field(
        default=None,
        metadata={"help": "padded tokens in one forward pass; default: per-device batch x block size"},
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "steps are this over the sampling probability"})
    max_train_steps: int | None = field(default=None, metadata={"help": "number of steps, instead of the epochs"})
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "adamw; sgd; dp-adam: AdamW with the noise's variance taken out of the second moment",
            "choices": OPTIMIZERS,
        },
    )
    momentum: float = field(default=0.0, metadata={"help": "of --optimizer sgd"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak rate of the optimizer"})
    weight_decay: float = field(default=0.0, metadata={"help": "of the optimizer, on what is trained"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "shape of the rate", "choices": LR_SCHEDULERS})
    num_warmup_steps: int = field(default=0, metadata={"help": "steps over which the rate rises from 0"})
    gradient_sync: str = field(
        default="gather",
        metadata={
            "help": "how ranks add gradients: gather, in rank order; reduce sends less with many ranks",
            "choices": ("gather", "reduce"),
        },
    )
    gradient_ckpt: bool = field(
        default=False, metadata={"help": "activation checkpointing: less memory, about a third more time"}
    )
    seed: int = field(default=0, metadata={"help": "of the adapters' start; never of the noise or of the sampling"})

    @property
    def sync(self) -> Literal["gather", "reduce"]:
        """How ranks add gradients, as the engine names it."""
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

    output_dir: str = field(metadata={"help": "new folder for the adapter, the privacy report and the diagnostics"})
    checkpointing_steps: int = field(default=10, metadata={"help": "steps between checkpoints; 0 writes none"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept; older ones go"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "a checkpoint in --output_dir, or latest: the newest one, else the beginning of a run"},
    )
    eval_freq: int = field(default=10, metadata={"help": "steps between measurements of the held-out loss"})
    eval_at_start: bool = field(
        default=True, metadata={"help": "measure the held-out loss before the first step; --no_eval_at_start: do not"}
    )
    with_tracking: bool = field(
        default=False, metadata={"help": "write the (not private) metrics as TensorBoard files to the output folder"}
    )
    report_to: str | None = field(
        default=None,
        metadata={"help": "another tracker that receives the (not private) metrics", "choices": REPORT_TO_CHOICES},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print epsilon, noise, steps and memory; train and write nothing"}
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


CAUSAL_LM_GROUPS = (
    ModelArguments,
    DataArguments,
    PrivacyFlags,
    ClippingArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
)
