"""The names of the fine-tuning modes and their default learning rates, apart so that flags do not import torch.

`utils.classification.modes` says what each mode trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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

# Peak rates of AdamW to start a search from: (without privacy, with privacy). New and small parts take larger steps
# than pretrained ones. From single runs on SST-2 with MiniLM and batches of 1,024.
_LEARNING_RATES = {
    "lora": (6e-3, 1.2e-2),
    "ia3": (2e-2, 4e-2),
    "prefix": (1e-2, 1e-2),
    "soft-prompt": (1e-2, 5e-3),
    "soft-prompt+lora": (2e-3, 4e-3),
    "prefix+lora": (2e-3, 4e-3),
    "bias-only": (2e-3, 3e-3),
}


# 1e-4 for MiniLM; 5e-5 and 4e-5 for models as wide as BERT-base and BERT-large, near what Devlin et al. 2019 tried.
_PLAIN_WHOLE_RATE_TIMES_WIDTH, _LARGEST_PLAIN_WHOLE_RATE = 0.04, 1e-4


class ModelRates(NamedTuple):
    """Rates that follow from the model; each is found when it is called.

    Attributes:
        head: that of a head that trains alone.
        whole: that of a model of which every parameter is trained.
    """

    head: Callable[[], float]
    whole: Callable[[], float]


def plain_whole_rate(width: int) -> float:
    """The learning rate without privacy of a whole model of this width."""
    return float(f"{min(_LARGEST_PLAIN_WHOLE_RATE, _PLAIN_WHOLE_RATE_TIMES_WIDTH / width):.1e}")


def default_learning_rate(mode: str, of_model: ModelRates, *, private: bool) -> float:
    """The rate used if `--learning_rate` is not given."""
    if mode == "full":
        return of_model.whole()
    return of_model.head() if mode == "last-layer" else _LEARNING_RATES[mode][private]


def default_head_learning_rate(mode: str, of_model: ModelRates, *, rate: float, private: bool) -> float:
    """The head's rate if `--head_learning_rate` is not given; `rate` is that of the other parameters.

    A new head has small weights and passes small gradients to the layers below, which the noise drowns. So with privacy
    the head first grows at the rate of a head that trains alone. Full fine-tuning is different: its large gradients
    leave little of the clip norm to the head, and a fast head would follow the noise.
    """
    return of_model.head() if private and mode not in ("full", "last-layer") else rate


def virtual_tokens(mode: str, num_prepend_tokens: int) -> int:
    """How many positions a mode adds before each text."""
    return num_prepend_tokens if mode.startswith(("prefix", "soft-prompt")) else 0
