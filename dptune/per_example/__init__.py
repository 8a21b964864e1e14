"""Per-example gradients: `hooks` record them, `rules` compute them per layer type, `uses` and `recorded` keep them
until the norms are known, and `check` tests on `random_rows` whether they are right for a model. `quantized` and
`fixed_values` refuse models that mix examples or store data."""

from dptune.per_example.check import require_exact_gradients, require_precision, require_separate_rows
from dptune.per_example.hooks import PerExampleGradients
from dptune.per_example.precision import full_precision
from dptune.per_example.random_rows import RandomRow
from dptune.per_example.recorded import HalfAdded, Recorded
from dptune.per_example.rules import find_rule, known_layers, rule_for
from dptune.per_example.uses import Outer

__all__ = [
    "HalfAdded",
    "Outer",
    "PerExampleGradients",
    "RandomRow",
    "Recorded",
    "find_rule",
    "full_precision",
    "known_layers",
    "require_exact_gradients",
    "require_precision",
    "require_separate_rows",
    "rule_for",
]
