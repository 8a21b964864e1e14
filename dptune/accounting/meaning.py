"""What an epsilon means, in words: how strong it is called, and the odds that it leaves an attacker.

No torch in this file.
"""

from __future__ import annotations

import math

from dptune.accounting.rounding import rounded_up, rounded_up_to_figures

STRONG, REASONABLE = 1, 10  # epsilon, at most; Ponomareva et al. 2023, arXiv:2303.00654


def verdict(epsilon: float) -> str:
    """What Ponomareva et al. 2023 call an epsilon.

    >>> verdict(1), verdict(8), verdict(11)
    ('strong', 'reasonable', 'weak')
    """
    return "strong" if epsilon <= STRONG else "reasonable" if epsilon <= REASONABLE else "weak"


def log_odds(epsilon: float, delta: float) -> float:
    """The logarithm of how often the best attack is right for each time that it is wrong.

    The attacker knows all the other data, and a coin decided whether one unit was used. The best test between two
    neighbouring data sets that are equally likely beforehand is right with probability
    (exp(epsilon) + delta) / (1 + exp(epsilon)) (Kairouz, Oh and Viswanath 2015).
    """
    return epsilon + math.log1p(delta * math.exp(-epsilon)) - math.log1p(-delta)


def factor(epsilon: float) -> str:
    """exp(epsilon), rounded up to three figures; as a power of e where the number would mean nothing to a reader.

    >>> factor(1), factor(30)
    ('2.72', 'e^30')
    """
    if epsilon > 20:
        return f"e^{rounded_up(epsilon, trim=True)}"
    return rounded_up_to_figures(math.exp(epsilon), 3)
