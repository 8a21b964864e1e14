"""How long a private step takes: from a measured speed, or from a device's peak and an assumed share of it.

The estimate counts the operations of matrix products. The forward pass takes 2 per parameter and token, the gradients
by activations 2 more, and the gradients by trained weights 2 per trained parameter: 6 in all for a whole model, 4 for
adapters. Recomputed activations take another 2. Attention takes 4 per layer, token, channel and token of the row in
the forward pass, and twice that in the backward pass. All experts of a mixture count as if each token went through
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.models.known_devices import Device

EFFICIENCY = 0.3  # share of the peak that a private step reaches; assumed, not measured
# Noise values that a processor core makes and adds per second, from the 1.9 s of a GPT-2 small step
# (benchmarks/results/full_finetuning_cpu-2-cores_gpt2-small_2026-11-29.md). Each process makes one per trained value.
NOISE_PER_SECOND = 6.5e7


@dataclass(frozen=True)
class Speed:
    """How fast a private training goes.

    Attributes:
        tokens_per_second: over all processes.
        step_seconds: what a step takes besides its tokens.
        told: where the figures come from, in words.
    """

    tokens_per_second: float
    step_seconds: float
    told: str

    def seconds(self, examples: float, tokens_per_example: float) -> float:
        """The time of a step of so many examples."""
        return examples * tokens_per_example / self.tokens_per_second + self.step_seconds


def measured_speed(tokens_per_second: float) -> Speed:
    """The speed that the user measured, all parts of a step included."""
    return Speed(tokens_per_second, 0.0, f"{tokens_per_second:,.0f} tokens per second, as given")


def estimated_speed(model: Any, tokens_per_example: float, device: Device, processes: int, *, recompute: bool) -> Speed:
    """The speed of training a model as it is prepared.

    Args:
        model: a transformers model with its trained parameters; may be on the meta device.
        tokens_per_example: average number of tokens of a row.
        device: a device whose peak is known.
        processes: how many devices share a step.
        recompute: whether activations are recomputed in the backward pass.
    """
    if device.peak is None:
        raise RuntimeError("the flags were checked: a device without a known peak has a measured speed")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    flops = flops_per_token(model, tokens_per_example, recompute=recompute)
    tokens = EFFICIENCY * device.peak * processes / flops
    told = (
        f"{tokens:,.0f} tokens per second, estimated: {EFFICIENCY:.0%} (assumed) of the peak of {processes} x "
        f"{device.name}, {device.peak / 1e12:g} teraflops each"
    )
    return Speed(tokens, trained / NOISE_PER_SECOND, told)


def flops_per_token(model: Any, tokens_per_example: float, *, recompute: bool) -> float:
    """Floating-point operations of a private step per token; see the module's docstring, and `estimated_speed`."""
    config, forwards = model.config.get_text_config(), 2 if recompute else 1
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lookups, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and lookups.weight is not head.weight:  # a lookup multiplies nothing
        every -= lookups.weight.numel()
    attention = 4 * config.num_hidden_layers * config.hidden_size * tokens_per_example
    return 2 * every * (forwards + 1) + 2 * trained + attention * (forwards + 2)
