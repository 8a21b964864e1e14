"""The names of the ways of fine-tuning a classifier and their default rates: what flags need, without torch.

`utils.classification.modes` says what each way trains.
"""

from __future__ import annotations

from collections.abc import Callable

MODES = (
    "full",
    "last-layer",
    "lora",
    "ia3",
    "prefix",
    "soft-prompt",
    "soft-prompt+lora",
    "prefix+lora",
    "bias-only",
)

# Peak rates of AdamW to begin a search with, without privacy and with it: what is new and small takes larger steps than
# what was pretrained. From single runs on SST-2 with MiniLM and batches of 1,024.
_LEARNING_RATES = {
    "full": (1e-4, 1e-3),
    "lora": (6e-3, 1.2e-2),
    "ia3": (2e-2, 4e-2),
    "prefix": (1e-2, 1e-2),
    "soft-prompt": (1e-2, 5e-3),
    "soft-prompt+lora": (2e-3, 4e-3),
    "prefix+lora": (2e-3, 4e-3),
    "bias-only": (2e-3, 3e-3),
}


def default_learning_rate(mode: str, of_head: Callable[[], float], *, private: bool) -> float:
    """Where `--learning_rate` is not given; `of_head` measures that of a head that trains alone."""
    return of_head() if mode == "last-layer" else _LEARNING_RATES[mode][private]


def default_head_learning_rate(mode: str, of_head: Callable[[], float], *, rate: float, private: bool) -> float:
    """Of the head, where `--head_learning_rate` is not given; `rate` is that of the rest.

    A new head's small weights pass small gradients on to what is below it, which noise drowns: under privacy the head
    gets to its size first, at the rate of a head that trains alone. Not so where the whole model trains: its gradients
    are long from the start and leave little of the clip norm to the head, so that a fast one would follow the noise.
    """
    return of_head() if private and mode not in ("full", "last-layer") else rate


def virtual_tokens(mode: str, num_prepend_tokens: int) -> int:
    """Positions that a mode puts before each text."""
    return num_prepend_tokens if mode.startswith(("prefix", "soft-prompt")) else 0
