"""The modes of fine-tuning a sentence classifier: what each of them trains.

LoRA is dptune's own. (IA)^3 (Liu et al. 2022), prefixes (Li and Liang 2021) and soft prompts (Lester et al. 2021) come
from the PEFT library, around a model of `AutoModelForSequenceClassification`. A new task has a new classification head,
so every mode trains the whole head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import IA3Config, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from dptune._validate import refuse, require_count
from dptune.integrations.peft import class_logits
from dptune.lora import adapters, add_lora
from utils.classification.mode_defaults import MODES, virtual_tokens

_FLAG = "--finetune_mode"
_LONGEST_REASON = 100


def head_modules(model: Any) -> list[str]:
    """Names of the head's modules: all children but the backbone, such as `classifier` (BERT) or `score` (decoders).

    Raises:
        InvalidArgument: the model has no head with parameters.
    """
    names = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]
    if not names:
        refuse("--model_name_or_path", type(model).__name__, "has no classification head to train; give another model")
    return names


def head_parameters(model: Any, names: Sequence[str]) -> list[str]:
    """Those of the parameter `names` that belong to the classification head; `model` is from `prepare_mode`."""
    heads = head_modules(model.get_base_model() if isinstance(model, PeftModel) else model)
    return [name for name in names if any(f".{head}." in f".{name}" for head in heads)]


def prepare_mode(
    model: Any,
    mode: str,
    *,
    lora_r: int = 16,
    lora_alpha: float = 16.0,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    lora_target_modules: Sequence[str] | None = None,
    num_prepend_tokens: int = 20,
    prefix_projection: bool = False,
    also_trained: Sequence[str] = (),
) -> tuple[Any, list[str]]:
    """Choose what is trained.

    Args:
        model: a transformers classifier; changed in place.
        mode: one of MODES.
        lora_r, lora_alpha, use_rslora, lora_dropout: see `dptune.lora.add_lora`.
        lora_target_modules: layers to adapt (see there); None for attention queries and values.
        num_prepend_tokens: number of virtual tokens of a prefix or soft prompt.
        prefix_projection: compute the prefix by a small network, and train that network instead of the prefix.
        also_trained: other modules to train, because the checkpoint has no weights for them.

    Returns:
        The model (a `PeftModel` in PEFT's modes), and the names of the trained parameters in the model's order.

    Raises:
        InvalidArgument: the mode does not fit the model.
    """
    if mode not in MODES:
        refuse("finetune_mode", mode, f"give one of {', '.join(MODES)}")
    method, *others = mode.split("+")
    heads = [*head_modules(model), *also_trained]
    model.requires_grad_(method == "full")
    if method == "bias-only":
        _train_biases(model)
    if "lora" in (method, *others):
        targets = lora_target_modules or _attention_of(model)
        add_lora(model, rank=lora_r, alpha=lora_alpha, targets=targets, dropout=lora_dropout, by_root=use_rslora)
    if method in _PEFT:
        require_count("--num_prepend_tokens", num_prepend_tokens)
        how = {"num_virtual_tokens": num_prepend_tokens, "prefix_projection": prefix_projection}
        model = _in_peft(model, mode, _PEFT[method](how), heads)
        for _, adapter in adapters(model):  # PEFT froze them with the base model
            adapter.requires_grad_(True)
        if virtual_tokens(mode, num_prepend_tokens):
            _require_read(model, mode)
    else:
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
    return model, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _prefix(how: dict[str, Any]) -> PeftConfig:
    return PrefixTuningConfig(task_type=TaskType.SEQ_CLS, **how)


def _soft_prompt(how: dict[str, Any]) -> PeftConfig:
    """A soft prompt that starts as random words of the vocabulary: Lester et al. (2021) found it better than noise."""
    how = {"num_virtual_tokens": how["num_virtual_tokens"], "prompt_tuning_init": "SAMPLE_VOCAB"}
    return PromptTuningConfig(task_type=TaskType.SEQ_CLS, **how)


_PEFT: dict[str, Callable[[dict[str, Any]], PeftConfig]] = {
    "ia3": lambda _: IA3Config(task_type=TaskType.SEQ_CLS),
    "prefix": _prefix,
    "soft-prompt": _soft_prompt,
}


def _in_peft(model: Any, mode: str, config: PeftConfig, heads: Sequence[str]) -> Any:
    """`model` wrapped by PEFT, which freezes it, and trains and saves a copy of the head's modules."""
    config.modules_to_save = list(heads)
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # for example an architecture whose layers PEFT does not know
        reason = " ".join(str(error).split())
        refuse(_FLAG, mode, f"PEFT does not support it for {type(model).__name__} ({reason}); give another mode")


@torch.no_grad()
def _require_read(model: PeftModel, mode: str) -> None:
    """Refuse a model that fails with a prefix or soft prompt, or ignores it: changing it must change the logits."""
    kind, training = type(model.get_base_model()).__name__, model.training
    encoder = model.prompt_encoder[model.active_adapter]
    ids = torch.tensor([[3, 4]], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own = {name: value.clone() for name, value in encoder.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    model.eval()
    try:
        before = class_logits(model, inputs)
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
        read = not torch.equal(class_logits(model, inputs), before)
    except Exception as error:  # models fail in unrelated ways, deep inside
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        refuse(_FLAG, mode, f"{kind} does not run with it ({type(error).__name__}: {reason}); give another mode")
    finally:
        encoder.load_state_dict(own)
        model.train(training)
    if not read:
        refuse(_FLAG, mode, f"{kind} silently ignores it; give another mode")


def _train_biases(model: nn.Module) -> None:
    """BitFit (Ben Zaken et al. 2022)."""
    biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        refuse(_FLAG, "bias-only", f"{type(model).__name__} has no biases; give another mode, such as ia3")
    for parameter in biases:
        parameter.requires_grad_(True)


def _attention_of(model: Any) -> Sequence[str]:
    """The layers that PEFT's LoRA adapts by default in a model of this type."""
    kind = model.config.model_type
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if targets is None or isinstance(targets, str):
        refuse("--lora_target_modules", None, f"must be given for a model of type {kind}: names of its linear layers")
    return targets
