"""The most that any attack on membership may catch, from what a run spent.

With (epsilon, delta) for adding or removing one unit, every test obeys
    caught <= e^epsilon * false_alarms + delta    and    1 - false_alarms <= e^epsilon * (1 - caught) + delta
(Kairouz, Oh and Viswanath 2015). A run has one epsilon for each delta, and all of them hold together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dptune.accounting import Spend, running_epsilon
from dptune.ledger import LEDGER_NAME, Ledger
from dptune.published import published_part
from dptune.report.statement import REPORT_NAME, PrivacyStatement, read_privacy_report, spends_with_unused

Profile = tuple[tuple[float, float], ...]  # pairs of epsilon and delta that all hold

_DELTAS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)


def allowed_share(false_alarms: float, profile: Profile) -> float:
    """The largest share of training rows that an attack may flag if it flags this share of other rows.

    >>> allowed_share(0.01, ((math.log(3), 0.001),))
    0.031
    >>> allowed_share(0.01, ())
    1.0
    """
    bounds = [1.0]
    for epsilon, delta in profile:
        factor = math.exp(min(epsilon, 700.0))
        bounds += [factor * false_alarms + delta, 1 - (1 - delta - false_alarms) / factor]
    return round(max(min(bounds), 0.0), 12)


def profile_of_spends(spends: Sequence[Spend], delta: float) -> Profile:
    """Pairs of epsilon and delta that hold for these releases, with deltas above `delta`."""
    return tuple((running_epsilon(spends, delta=one), one) for one in _DELTAS if one > delta)


def profile_of_run(folder: str) -> tuple[PrivacyStatement, Profile]:
    """(what a finished run states, the pairs that follow from its ledger); no pairs without a guarantee.

    Raises:
        InvalidArgument: the report or the ledger is missing or damaged.
    """
    published = published_part(folder)
    statement = read_privacy_report(published / REPORT_NAME)
    if statement.epsilon is None or statement.delta is None:
        return statement, ()
    ledger = Ledger(published / LEDGER_NAME, group_size=statement.group_size)
    spends = spends_with_unused(statement, ledger, statement.unused_steps)
    return statement, ((statement.epsilon, statement.delta), *profile_of_spends(spends, statement.delta))
