"""The fixed time of a forward and backward pass, which decides how many rows a micro-batch should have.

It is given as the number of tokens that take as long. If it is large, few large micro-batches are faster than many that
fit their rows closely. It follows from the settings alone, never from the data, as shapes must (`dptune.shapes`).

No torch in this file.
"""

from __future__ import annotations

# Measured: SmolLM2-135M in float32, 77 tokens with LoRA and 89 with every weight trained
# (benchmarks/results/pass_overhead_cpu-2-cores_2026-11-29.md).
_CPU = 80
# Estimated, not measured yet. Starting the kernels of a pass takes as long as 200 tokens of a Llama of 7 billion
# weights, and as 8,000 of one of 135 million. Products of fewer than a thousand tokens leave much of a GPU idle.
_ACCELERATOR = 1000
# Estimated: the gathers of a layer's weights take as long as 1,300 tokens over the fastest links between GPUs, and as
# ten times that over slow ones. Processes on one machine's CPU share its memory.
_GATHERS, _CPU_GATHERS = 3000, 300


def pass_overhead(*, accelerator: bool, sharded: bool = False) -> int:
    """The tokens that take as long as the fixed part of a pass.

    Args:
        accelerator: whether a GPU or the like computes, instead of the CPU.
        sharded: whether each pass gathers the weights from other ranks.
    """
    alone, gathers = (_ACCELERATOR, _GATHERS) if accelerator else (_CPU, _CPU_GATHERS)
    return alone + (gathers if sharded else 0)
