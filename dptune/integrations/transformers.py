"""Private training with transformers: `DPTrainer`, or a plain `Trainer` made private by a callback.

docs/how_to/trainer.md shows both. This module needs transformers and accelerate (`pip install dptune[scripts]`).
"""

from dptune.integrations.arguments import TrainingArguments
from dptune.integrations.callback import PrivacyEngineCallback
from dptune.integrations.collator import DataCollatorForPrivateCausalLanguageModeling
from dptune.integrations.engine import PrivacyEngine
from dptune.integrations.privacy_arguments import PrivacyArguments
from dptune.integrations.trainer import DPTrainer

__all__ = [
    "DPTrainer",
    "DataCollatorForPrivateCausalLanguageModeling",
    "PrivacyArguments",
    "PrivacyEngine",
    "PrivacyEngineCallback",
    "TrainingArguments",
]
