"""The fixed time of a forward and backward pass, which decides how many rows a micro-batch should have.

It is given as the number of tokens that take as long. If it is large, few large micro-batches are faster than many that
fit their rows closely. It follows from the settings alone, never from the data, as shapes must (`dptune.shapes`).
"""

from __future__ import annotations

from torch import nn

from dptune.lora import trainable_parameters

# Tokens. Measured on a CPU (benchmarks/results/pass_overhead_*). A private pass that trains every weight also makes and
# adds a sum as large as the model.
_CPU_ADAPTERS, _CPU_WHOLE = 52, 52
# Estimated for an accelerator, not measured: starting the kernels of a pass takes as long as 200 tokens of a Llama of
# 7 billion weights and 8,000 of one of 135 million, and products of fewer than a thousand tokens leave much of it idle.
_ACCELERATOR = 1000
# Gathering the weights of a shard over a fast link takes as long as 1,300 tokens, and over a slow one ten times that.
_GATHERS = 4000


def pass_overhead(model: nn.Module, *, accelerator: bool, sharded: bool = False) -> float:
    """The tokens that take as long as the fixed part of a pass.

    Args:
        model: its parameters that require gradients are trained.
        accelerator: whether a GPU or the like computes, instead of the CPU.
        sharded: whether each pass gathers the weights from other ranks.
    """
    if sharded:
        return _GATHERS
    if accelerator:
        return _ACCELERATOR
    trained = sum(parameter.numel() for parameter in trainable_parameters(model))
    share = trained / sum(parameter.numel() for parameter in model.parameters())
    return _CPU_ADAPTERS + share * (_CPU_WHOLE - _CPU_ADAPTERS)
