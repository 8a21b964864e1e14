"""Per-example gradients: what records them (hooks) and how each layer type makes them (rules)."""

from dptune.per_example.hooks import PerExampleGradients
from dptune.per_example.rules import find_rule, known_layers, rule_for

__all__ = ["PerExampleGradients", "find_rule", "known_layers", "rule_for"]
