"""Classification with PEFT: which of its methods the engine supports, and logits that depend on their own row alone.

Two faults of the libraries are avoided here. transformers' decoders classify every row by its last position when they
are given embeddings, as with a soft prompt. A shorter row would be classified by its padding, and its gradient would
depend on its neighbours. PEFT gives encoders an attention mask without the prefix, which fails if a row is padded.
This module computes both cases itself, with PEFT's modules and file format.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from dptune._validate import refuse

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TransformersModel: TypeAlias = "PreTrainedModel | PeftModel"

PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
KNOWN_METHODS = ("IA3", "LORA", PREFIX, PROMPT)


def method_of(model: object) -> str | None:
    """Name of the PEFT method of `model`, such as "LORA"; None for a plain model."""
    config = getattr(model, "active_peft_config", None)
    return None if config is None else config.peft_type.value


def require_known_method(model: TransformersModel) -> None:
    """Refuse a PEFT method or configuration without known per-example gradients.

    Raises:
        InvalidArgument: the method, and what to use instead.
    """
    method = method_of(model)
    if method is None:
        return
    if method not in KNOWN_METHODS:
        refuse("peft_type", method, f"no per-example gradients are known for it; use one of {', '.join(KNOWN_METHODS)}")
    if len(model.peft_config) != 1:
        refuse("peft_config", ", ".join(model.peft_config), "several PEFT adapters; train one at a time")
    if model.active_peft_config.inference_mode:
        refuse("inference_mode", True, f"PEFT's {method} does not train in this mode; set it to False")
    if getattr(model.active_peft_config, "num_transformer_submodules", None) == 2:
        refuse("peft_type", method, "not supported for encoder-decoder models; use LoRA or (IA)^3")


def class_logits(model: TransformersModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, C] of a sequence classifier of the transformers library, plain or inside a PEFT model.

    Args:
        model: an encoder classifies in its usual way. A decoder (a model with a head called `score`) classifies by the
            last token of each row that the mask includes.
        inputs: "input_ids" and "attention_mask" [B, T], padded on the right, and "token_type_ids" for an encoder.

    Raises:
        InvalidArgument: there is no mask, rows are padded on the left, or gradient checkpointing meets a prefix.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        refuse("attention_mask", None, "padding cannot be told from text without it; let the tokenizer return it")
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        refuse("attention_mask", tuple(mask.shape), "rows must be padded on the right: set padding_side to right")
    base = model.get_base_model() if method_of(model) is not None else model
    if method_of(model) == PREFIX and base.training and _recomputes(base):
        refuse("gradient_checkpointing", True, "transformers would silently drop the prefix; switch it off")
    if hasattr(base, "score"):
        return _decoder_logits(model, base, inputs["input_ids"], mask)
    if method_of(model) == PREFIX:
        return _prefixed_encoder_logits(model, base, inputs)
    output = base(**prompted(model, base, inputs)) if method_of(model) == PROMPT else model(**inputs)
    logits: Tensor = output.logits
    return logits


def _recomputes(base: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def _decoder_logits(model: TransformersModel, base: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """No mask is needed: with causal attention, no real token sees padding on the right."""
    method, last, rows = method_of(model), mask.sum(1) - 1, torch.arange(len(ids), device=ids.device)
    if method == PROMPT:
        embedded = prompted(model, base, {"input_ids": ids})["inputs_embeds"]
        hidden = base.base_model(inputs_embeds=embedded, use_cache=False)[0]
        last = last + embedded.shape[1] - ids.shape[1]
    elif method == PREFIX:
        hidden = base.base_model(input_ids=ids, past_key_values=model.get_prompt(batch_size=len(ids)))[0]
    else:
        hidden = base.base_model(input_ids=ids, use_cache=False)[0]
    logits: Tensor = base.score(hidden[rows, last])
    return logits


def prompted(model: PeftModel, base: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as embeddings behind the soft prompt, with mask and token types extended to match.

    PEFT looks the prompt up once and repeats it; here every row looks it up, so that each row has its own gradient.
    """
    embedded = base.get_input_embeddings()(inputs["input_ids"])
    tokens = model.prompt_tokens[model.active_adapter].to(embedded.device).expand(len(embedded), -1)
    prompts = model.prompt_encoder[model.active_adapter](tokens).to(embedded.dtype)
    found = {"inputs_embeds": torch.cat([prompts, embedded], 1)}
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        found["attention_mask"] = torch.cat([mask.new_ones(tokens.shape), mask], 1)
    if "token_type_ids" in inputs:
        types = inputs["token_type_ids"]
        found["token_type_ids"] = torch.cat([types.new_zeros(tokens.shape), types], 1)
    return found


def _prefixed_encoder_logits(model: PeftModel, base: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Give the backbone the prefix and a mask that includes it; pooling and head stay the model's own."""
    mask = inputs["attention_mask"]
    prefix = model.get_prompt(batch_size=len(mask))
    seen = torch.cat([mask.new_ones(len(mask), model.active_peft_config.num_virtual_tokens), mask], 1)
    dtype = next(base.parameters()).dtype
    added = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
    added.masked_fill_(seen.eq(0), torch.finfo(dtype).min)
    wide = added[:, None, None, :].expand(-1, 1, mask.shape[1], -1)

    def put_prefix(_: object, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, kwargs | {"attention_mask": wide, "past_key_values": prefix}

    hook = base.base_model.register_forward_pre_hook(put_prefix, with_kwargs=True)
    try:
        logits: Tensor = base(**inputs).logits
        return logits
    finally:
        hook.remove()
