"""One loss per example, for the models that a Trainer trains most often.

Shapes: B examples, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dptune._validate import refuse
from dptune.integrations.peft import PREFIX, PROMPT, TransformersModel, class_logits, method_of
from dptune.losses import IGNORE, CausalLMLoss
from dptune.sharding import compute_device, original_class_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

TrainerLosses = Callable[[Any, Mapping[str, Tensor]], Tensor]  # (model, inputs of a micro-batch) -> losses [B]

_CAUSAL = {
    name
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for name in ([names] if isinstance(names, str) else names)
}
_CAUSAL_INPUTS = {"input_ids", "labels", "attention_mask", "position_ids"}


def _refuse_task(model: TransformersModel, labels: Tensor | None) -> NoReturn:
    shape, kind = None if labels is None else tuple(labels.shape), original_class_name(_base(model))
    refuse(
        "losses",
        None,
        f"no per-example loss is known for {kind} with labels of shape {shape}; pass your own "
        "function that gives one loss per example, [B], each from that example alone",
    )


class DefaultLosses:
    """(model, inputs) -> losses [B]: causal language modelling for labels [B, T], classification for labels [B].

    The inputs of a language model are `input_ids` and `labels`, padded on the right. An attention mask and position ids
    are allowed if they describe that padding.

    Raises:
        InvalidArgument: other models or inputs, which need your own function.
    """

    def __init__(self) -> None:
        self._causal: tuple[PreTrainedModel, CausalLMLoss] | None = None

    def __call__(self, model: TransformersModel, inputs: Mapping[str, Tensor]) -> Tensor:
        labels = inputs.get("labels")
        if labels is not None and labels.ndim == 2 and is_causal_lm(model):
            _require_plain_rows(inputs)
            return self._causal_loss(model)(inputs["input_ids"], labels)
        if labels is not None and _are_classes(labels):
            given = {name: value for name, value in inputs.items() if name != "labels"}
            logits = class_logits(model, given) if method_of(model) in (PREFIX, PROMPT) else model(**given).logits
            return class_losses(model, logits, labels)
        _refuse_task(model, labels)

    def _causal_loss(self, model: TransformersModel) -> CausalLMLoss:
        base = _base(model)
        if self._causal is None or self._causal[0] is not base:
            _require_only_past(base)
            self._causal = (base, CausalLMLoss(base))
        return self._causal[1]


def losses_of_outputs(
    model: TransformersModel, outputs: ModelOutput | tuple[Tensor, ...], labels: Tensor | None
) -> Tensor:
    """The same losses [B] from the outputs of `model` for a micro-batch, for a loop that calls the model itself."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if labels is not None and labels.ndim == 2 and is_causal_lm(model):
        return mean_token_losses(logits, labels)
    if labels is not None and _are_classes(labels):
        if method_of(model) in (PREFIX, PROMPT):
            refuse("model", method_of(model), "its pooling sees a row's padding, which couples the rows; use DPTrainer")
        return class_losses(model, logits, labels)
    _refuse_task(model, labels)


def mean_token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood over the labelled tokens of each example, [B], in nats; labels are shifted here."""
    targets = labels_BT[:, 1:]
    logits_BVT = logits_BTV[:, :-1].to(torch.promote_types(logits_BTV.dtype, torch.float32)).transpose(1, 2)
    sums = F.cross_entropy(logits_BVT, targets, ignore_index=IGNORE, reduction="none").sum(1)
    return sums / targets.ne(IGNORE).sum(1).clamp_min(1)


def class_losses(model: TransformersModel, logits_BV: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy of each example, [B], in nats.

    Raises:
        InvalidArgument: the logits are not [B, V] with at least two classes.
    """
    if logits_BV.ndim != 2 or logits_BV.shape[1] < 2:
        _refuse_task(model, labels_B)
    dtype = torch.promote_types(logits_BV.dtype, torch.float32)
    return F.cross_entropy(logits_BV.to(dtype), labels_B, ignore_index=IGNORE, reduction="none")


def _are_classes(labels: Tensor) -> bool:
    return labels.ndim == 1 and not labels.is_floating_point()


def _base(model: TransformersModel) -> PreTrainedModel:
    """The transformers model inside a PEFT model; both share their layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_causal_lm(model: TransformersModel) -> bool:
    """Whether the default losses take the model for a causal language model."""
    base = _base(model)
    return original_class_name(base) in _CAUSAL and not getattr(base.config, "is_encoder_decoder", False)


def _require_plain_rows(inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs that `CausalLMLoss` would ignore wrongly, since it uses the ids alone."""
    unknown = sorted(inputs.keys() - _CAUSAL_INPUTS)
    if unknown:
        refuse("inputs", ", ".join(unknown), "not supported by the default loss; drop the columns or pass losses=")
    if (found := unplain_part(inputs)) is not None:
        refuse(found[0], tuple(inputs[found[0]].shape), found[1])


def unplain_part(inputs: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(name of an input, what is wrong) if ids and labels alone do not say where a row ends; None if they do."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (mask.ndim != 2 or bool((mask[:, 1:] > mask[:, :-1]).any())):
        return "attention_mask", "rows must be padded on the right: set padding_side to right"
    if mask is not None and bool((inputs["labels"].ne(IGNORE) & mask.eq(0)).any()):
        return "labels", "there is a label where the attention mask is 0; set it to -100"
    if positions is not None and not bool(
        (positions == torch.arange(positions.shape[-1], device=positions.device)).all()
    ):
        return "position_ids", "must count from 0 in every row; pass losses= for others"
    return None


@torch.no_grad()
def _require_only_past(model: PreTrainedModel) -> None:
    """Refuse a model whose tokens see later tokens. They would see padding, whose length depends on other examples."""
    device = compute_device(model)
    first = torch.tensor([[1, 2, 3, 4]], device=device)
    second = torch.tensor([[1, 2, 3, 5]], device=device)
    was_training = model.training
    model.eval()
    one, other = (model(input_ids=ids, use_cache=False).logits[:, :3].float() for ids in (first, second))
    model.train(was_training)
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
        refuse("model", type(model).__name__, "its tokens see later tokens; set config.is_decoder or pass losses=")
