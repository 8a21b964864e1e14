"""dptune: differentially private fine-tuning of large language models.

This package holds everything that can change epsilon, and nothing else. Start with `PrivacyConfig`, `add_lora`,
`PoissonSampler`, `deal`, `CausalLMLoss` and `PrivateStep`; docs/how_to/loop.md shows them in one loop.

Names are imported when they are first used (PEP 562), so `import dptune.accounting` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; `_HOMES` is the same list for Python
    from dptune._validate import InvalidArgument
    from dptune.adapter_files import attach_adapter, save_adapter
    from dptune.clipping_styles import Adaptive, Automatic, PerLayer
    from dptune.keystream import Keystream
    from dptune.ledger import Ledger
    from dptune.lora import add_lora, merge_lora, trainable_parameters, unmerge_lora
    from dptune.losses import CausalLMLoss
    from dptune.mechanism import PrivacyConfig
    from dptune.noise import GaussianNoise
    from dptune.optimizers import DPAdam, LowPassAdam
    from dptune.per_example import PerExampleGradients, require_exact_gradients
    from dptune.plain_step import PlainStep
    from dptune.sampling import Parts, PoissonSampler, deal
    from dptune.step import PrivateStep

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "Automatic",
    "CausalLMLoss",
    "DPAdam",
    "GaussianNoise",
    "InvalidArgument",
    "Keystream",
    "Ledger",
    "LowPassAdam",
    "Parts",
    "PerExampleGradients",
    "PerLayer",
    "PlainStep",
    "PoissonSampler",
    "PrivacyConfig",
    "PrivateStep",
    "add_lora",
    "attach_adapter",
    "deal",
    "merge_lora",
    "require_exact_gradients",
    "save_adapter",
    "trainable_parameters",
    "unmerge_lora",
]

_HOMES = {
    "_validate": ("InvalidArgument",),
    "adapter_files": ("attach_adapter", "save_adapter"),
    "clipping_styles": ("Adaptive", "Automatic", "PerLayer"),
    "keystream": ("Keystream",),
    "ledger": ("Ledger",),
    "lora": ("add_lora", "merge_lora", "trainable_parameters", "unmerge_lora"),
    "losses": ("CausalLMLoss",),
    "mechanism": ("PrivacyConfig",),
    "noise": ("GaussianNoise",),
    "optimizers": ("DPAdam", "LowPassAdam"),
    "per_example": ("PerExampleGradients", "require_exact_gradients"),
    "plain_step": ("PlainStep",),
    "sampling": ("Parts", "PoissonSampler", "deal"),
    "step": ("PrivateStep",),
}
_HOME_OF = {name: f"dptune.{module}" for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker that sees this function would accept any misspelt name

    def __getattr__(name: str) -> object:
        """Import a name of `__all__` from its module, once."""
        if name not in _HOME_OF:
            raise AttributeError(f"module 'dptune' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
