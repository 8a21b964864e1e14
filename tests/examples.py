"""Random examples of different lengths, and the batches that the engine takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference import Example


def random_examples(
    count: int, *, seed: int = 0, vocab_size: int = 400, shortest: int = 3, longest: int = 24
) -> list[Example]:
    """Examples of different lengths, each with a prompt of unlabelled tokens and at least one labelled token."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        prompt = int(torch.randint(1, length, (), generator=generator))
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        examples.append((ids, [-100] * prompt + ids[prompt:]))
    return examples


def padded(examples: Sequence[Example], pad: int = 0) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), [B, T], padded on the right."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    return ids, labels


def randomise_adapters(model: torch.nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Adapters away from their start. With B at zero, the gradients of A are all zero and test nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
