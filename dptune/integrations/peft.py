"""Classification with PEFT's methods: which of them the engine knows, and logits that depend on their own row alone.

transformers' decoders take the last position of every row for its class when they are given embeddings, as a soft
prompt makes them: a row padded to its neighbour's length would then be classified by padding, and its gradient would
depend on that neighbour. PEFT's prefixes reach encoders with an attention mask that leaves the prefix out, which fails
as soon as a row is padded. Both are done here instead, with PEFT's modules and with its files.

Shapes: B rows, T tokens, P virtual tokens, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dptune._validate import refuse

PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
KNOWN_METHODS = ("IA3", "LORA", PREFIX, PROMPT)


def method_of(model: Any) -> str | None:
    """The name of the PEFT method around `model`; None for a plain model."""
    config = getattr(model, "active_peft_config", None)
    return None if config is None else config.peft_type.value


def require_known_method(model: Any) -> None:
    """Refuse a PEFT method whose per-example gradients the engine does not know.

    Raises:
        InvalidArgument: naming it.
    """
    method = method_of(model)
    if method is None:
        return
    if method not in KNOWN_METHODS:
        refuse(
            "peft_type", method, f"no per-example gradients are known for it; take one of {', '.join(KNOWN_METHODS)}"
        )
    if len(model.peft_config) != 1:
        refuse("peft_config", ", ".join(model.peft_config), "several PEFT adapters; train one at a time")
    if model.active_peft_config.inference_mode:
        refuse("inference_mode", True, f"PEFT's {method} does not train in it; set it to False")
    if getattr(model.active_peft_config, "num_transformer_submodules", None) == 2:
        refuse("peft_type", method, "not for encoder-decoder models; take LoRA or (IA)^3")


def class_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, C] of a sequence classifier of the transformers library, plain or inside a PEFT model.

    Args:
        model: an encoder classifies as its class does; a decoder (its head is called `score`) by the last token of each
            row that the mask does not leave out.
        inputs: "input_ids" and "attention_mask" [B, T], padded on the right, and "token_type_ids" for an encoder.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        refuse("attention_mask", None, "without it padding cannot be told from text; let the tokenizer return it")
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        refuse("attention_mask", tuple(mask.shape), "rows must be padded on the right: set padding_side to right")
    base = model.get_base_model() if method_of(model) is not None else model
    if method_of(model) == PREFIX and base.training and _recomputes(base):
        refuse("gradient_checkpointing", True, "transformers then leaves the prefix out in silence; switch it off")
    if hasattr(base, "score"):
        return _decoder_logits(model, base, inputs["input_ids"], mask)
    if method_of(model) == PREFIX:
        return _prefixed_encoder_logits(model, base, inputs)
    output = base(**prompted(model, base, inputs)) if method_of(model) == PROMPT else model(**inputs)
    logits: Tensor = output.logits
    return logits


def _recomputes(base: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def _decoder_logits(model: Any, base: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """No mask is needed: under causal attention padding on the right is never seen by a real token."""
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


def prompted(model: Any, base: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs as embeddings behind the soft prompt, with the mask and the token types that they then have.

    PEFT looks the prompt up once and repeats the rows; here every row looks it up, so that each has a gradient."""
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


def _prefixed_encoder_logits(model: Any, base: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The backbone gets the prefix, and a mask that has it; pooling and head stay the model's own."""
    mask = inputs["attention_mask"]
    prefix = model.get_prompt(batch_size=len(mask))
    seen = torch.cat([mask.new_ones(len(mask), model.active_peft_config.num_virtual_tokens), mask], 1)
    dtype = next(base.parameters()).dtype
    added = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
    added.masked_fill_(seen.eq(0), torch.finfo(dtype).min)
    wide = added[:, None, None, :].expand(-1, 1, mask.shape[1], -1)

    def put_prefix(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": wide, "past_key_values": prefix}

    hook = base.base_model.register_forward_pre_hook(put_prefix, with_kwargs=True)
    try:
        logits: Tensor = base(**inputs).logits
        return logits
    finally:
        hook.remove()
