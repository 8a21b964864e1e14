"""A frozen base model in 4 or 8 bits, with bitsandbytes.

4 bits: NF4 (Dettmers et al. 2023); weights are dequantised for every product. 8 bits: LLM.int8() (Dettmers et al. 2022)
with its outlier threshold at 0. A positive threshold picks columns by the largest activation in the whole micro-batch,
so one example would change the rounding, and the gradient, of another. At 0, each token's activations are scaled by
that token alone.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dptune._validate import refuse

if TYPE_CHECKING:  # for types only: modules of flags import this one without loading torch
    import torch
    from torch import nn

BITS = (4, 8, 16)


def require_available(bits: int) -> None:
    """Raise `InvalidArgument` for fewer than 16 bits if bitsandbytes is not installed."""
    if bits != 16 and find_spec("bitsandbytes") is None:
        refuse("--qbits", bits, "needs bitsandbytes: pip install bitsandbytes, or give --qbits 16")


def quantized_loading(bits: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model in `bits` bits that computes in `dtype`; none for 16 bits."""
    if bits == 16:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    require_available(bits)
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        # bitsandbytes warns at every product that it rounds activations to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def keep_differentiable(model: nn.Module) -> None:
    """Stop 4-bit layers of `model` from switching to a weight layout that no gradient passes through.

    On a CPU with AVX512-BF16, a layer switches for good at its first product in evaluation mode whose input needs no
    gradient: in the first layer, or at an evaluation. Its product is then an operator without a derivative, and
    gradients of earlier layers silently lose a part (bitsandbytes 0.50.2).
    """
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def round_rows_alone(model: nn.Module) -> None:
    """Set the outlier threshold of every 8-bit layer of `model` to 0. A checkpoint that is stored in 8 bits brings its
    own threshold, whatever `quantized_loading` asks for."""
    layers: list[Any] = [layer for layer in model.modules() if type(layer).__name__ == "Linear8bitLt"]
    for layer in layers:
        layer.state.threshold = 0.0
