"""dptune: differentially private fine-tuning of large language models.

The engine: everything that can change epsilon, and nothing else. Start with `PrivacyConfig`, `add_lora`,
`PoissonSampler`, `deal`, `CausalLMLoss` and `PrivateStep`; README.md shows them in one loop.
"""

from dptune._validate import InvalidArgument
from dptune.adapter_files import attach_adapter, save_adapter
from dptune.clipping import Adaptive, Automatic, PerLayer
from dptune.keystream import Keystream
from dptune.ledger import Ledger
from dptune.lora import add_lora, merge_lora, trainable_parameters, unmerge_lora
from dptune.losses import CausalLMLoss
from dptune.mechanism import PrivacyConfig
from dptune.noise import GaussianNoise
from dptune.optimizers import DPAdam
from dptune.per_example import PerExampleGradients, require_exact_gradients
from dptune.sampling import PoissonSampler, deal
from dptune.step import PlainStep, PrivateStep

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
