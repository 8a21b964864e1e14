"""A frozen base in 4 or 8 bits, by bitsandbytes.

4 bits: NF4 (Dettmers et al. 2023), weights are restored for every product. 8 bits: LLM.int8() (Dettmers et al. 2022)
with its outlier threshold at 0. A threshold picks columns by the largest activation in the whole micro-batch, so one
example would change how another's product is rounded, and its gradient with it; without one, each token's activations
are scaled by that token alone.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dptune._validate import refuse

if TYPE_CHECKING:  # flags import this module, and do not wait for torch
    import torch
    from torch import nn

BITS = (4, 8, 16)


def require_available(bits: int) -> None:
    """bitsandbytes must be there for fewer than 16 bits. Raises `InvalidArgument` otherwise."""
    if bits != 16 and find_spec("bitsandbytes") is None:
        refuse("--qbits", bits, "needs bitsandbytes: pip install bitsandbytes, or give --qbits 16")


def quantized_loading(bits: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base of so many bits that computes in `dtype`; none for 16 bits."""
    if bits == 16:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    require_available(bits)
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        # It warns at every product of every step that activations which are not float16 are rounded to it.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def keep_differentiable(model: nn.Module) -> None:
    """Keep the 4-bit layers of `model` from a form of their weights that no gradient passes through.

    On a CPU with AVX512-BF16 such a layer lays its weights out anew, for good, at its first product in evaluation mode
    whose input needs no gradient: in the first layer, or at a measurement. Its products are then one operator without a
    derivative, and gradients of what lies before it silently lose a part (bitsandbytes 0.50.2).
    """
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
