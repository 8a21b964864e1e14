"""Chooses the trained parameters, adapters or the model's own; sets their precision, checks and saves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dptune._validate import refuse
from dptune.adapter_files import attach_adapter, require_savable
from dptune.integrations.sharded_saving import write_sharded
from dptune.lora import add_lora
from dptune.losses import IGNORE
from dptune.per_example import RandomRow, require_precision, require_separate_rows
from dptune.sharding import is_sharded

_FLAG = "--trainable"
_PRESETS = ("all", "biases", "norms")
_PADDING = 1000  # the number of the first padding; rows have smaller ones

Losses = Callable[..., Tensor]  # (input_ids [B, T], labels [B, T]) -> [B]


class Choice(Protocol):
    """The flags that choose what is trained."""

    trainable: list[str] | None
    initial_adapter: str | None
    lora_r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    lora_target_modules: list[str]


def prepare_trainable(
    model: nn.Module, choice: Choice, *, bits: int = 16, dtype: torch.dtype = torch.float32, private: bool = True
) -> list[str]:
    """Add adapters, or choose among the model's own parameters; returns the names of all trained parameters.

    Args:
        model: the base model, or its skeleton.
        choice: the flags.
        bits, dtype: settings of the launch and the base model.
        private: whether the run is private.

    Raises:
        InvalidArgument: a name matches nothing, an initial adapter does not fit, or parameters cannot be trained in
            this precision.
    """
    if choice.initial_adapter is not None:
        attach_adapter(model, choice.initial_adapter, dropout=choice.lora_dropout)
        require_savable(model)
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not choice.trainable:
        add_lora(
            model,
            rank=choice.lora_r,
            alpha=choice.lora_alpha,
            targets=choice.lora_target_modules,
            dropout=choice.lora_dropout,
            by_root=choice.use_rslora,
        )
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    given = " ".join(choice.trainable)
    if bits != 16:
        refuse(_FLAG, given, f"weights of --qbits {bits} cannot be trained; give 16")
    if dtype == torch.float16 and not private:
        reason = "without privacy the weights' gradients are summed in float16, which overflows"
        refuse(_FLAG, given, f"{reason}; set mixed_precision to bf16 or no")
    return choose_trainable(model, choice.trainable)


def choose_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Make exactly the parameters that `patterns` match trainable; returns their names, shared ones once.

    Args:
        model: any model.
        patterns: `all`, `biases` (BitFit, Ben Zaken et al. 2022), `norms` (scales and shifts of LayerNorm and RMSNorm),
            or names with shell wildcards, such as `*.attn.*`.

    Raises:
        InvalidArgument: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        found = _names_of(model, names, pattern)
        if not found:
            refuse(
                _FLAG,
                pattern,
                f"matches no parameter; give {', '.join(_PRESETS)} or a pattern for names such as {names[0]}",
            )
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


def _names_of(model: nn.Module, names: Sequence[str], pattern: str) -> set[str]:
    if pattern == "all":
        return set(names)
    if pattern == "biases":
        return {name for name in names if name.rpartition(".")[2] == "bias"}
    if pattern == "norms":
        return {
            f"{layer}.{name}".lstrip(".")
            for layer, module in model.named_modules()
            if isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
            for name, _ in module.named_parameters(recurse=False)
        }
    return {name for name in names if fnmatchcase(name, pattern)}


def parameters_by_name(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of these parameters on the CPU."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().cpu().clone() for name in names}


def in_autocast(losses: Losses, dtype: torch.dtype, device: torch.device) -> Losses:
    """`losses` computed in `dtype`, while the weights stay in float32: bfloat16 weights would round small updates
    away."""
    if dtype == torch.float32:
        return losses

    def cast(*batch: Tensor, **named: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return losses(*batch, **named)

    return cast


def check_rules(model: Any, losses: Losses, device: torch.device, *, width: int) -> None:
    """Compare the engine's gradients with autograd's on random tokens before training, for short rows beside long ones
    and for each row alone.

    Args:
        width: tokens of the longest row that the settings allow, since its effect on others may depend on its length.

    Raises:
        InvalidArgument: the engine's gradient rules do not cover the model, or a row's gradient depends on its padding
            or on other rows.
    """
    require_separate_rows(model, losses, _random_batches(model, device), longest=width)


def check_precision(
    model: Any, losses: Losses, lower: Losses, device: torch.device, *, width: int, scale: float
) -> None:
    """Compare the engine's gradients in lower precision with those in the weights' precision, on random tokens.

    Args:
        losses, lower: the losses in both.
        width: tokens of the longest row that the settings allow.
        scale: the loss scale of training.

    Raises:
        InvalidArgument: they overflow or vanish.
    """
    require_precision(model, losses, lower, _random_batches(model, device), longest=width, scale=scale)


def _random_batches(model: Any, device: torch.device) -> Callable[[Sequence[RandomRow]], list[Tensor]]:
    """(rows) -> token ids and labels of random rows."""
    vocab_size = model.config.get_text_config().vocab_size

    def batch_of(rows: Sequence[RandomRow]) -> list[Tensor]:
        """Padded by random tokens: in training, what pads a row has a meaning elsewhere."""
        labels = pad_sequence([row.tokens(vocab_size) for row in rows], batch_first=True, padding_value=IGNORE)
        number = _PADDING + sum(row.number for row in rows)
        padding = RandomRow(labels.numel(), number).tokens(vocab_size).view_as(labels)
        return [labels.where(labels.ne(IGNORE), padding).to(device), labels.to(device)]

    return batch_of


def save_trained_model(model: Any, folder: Path) -> None:
    """Write a model to a folder for `from_pretrained`. If the weights are sharded, the other ranks call
    `write_sharded(model, None)` meanwhile."""
    if is_sharded(model):
        write_sharded(model, folder)
    else:
        model.save_pretrained(folder)
