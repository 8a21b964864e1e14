"""What the attacks found, and what it means: against guessing, and against what epsilon allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.attacks.allowed import Profile, allowed_share
from utils.attacks.copied import Copied
from utils.attacks.exposure import Exposure
from utils.attacks.membership import START, Attack, Caught, attack

ROWS, AUTHORS = "rows", "authors"
FOUND_CHANCE = 0.01  # a secret whose rank is less likely than that, among all secrets, is given away


@dataclass(frozen=True)
class Membership:
    """Attacks on membership of rows, or of authors.

    Attributes:
        of: ROWS or AUTHORS.
        members, others: scores by attack, [M] and [N].
        attacks: the result of each.
    """

    of: str
    members: Mapping[str, np.ndarray]
    others: Mapping[str, np.ndarray]
    attacks: Mapping[str, Attack] = field(init=False)

    def __post_init__(self) -> None:
        found = {name: attack(self.members[name], self.others[name]) for name in self.members}
        object.__setattr__(self, "attacks", found)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of training rows (or authors), and of held-out ones."""
        first = next(iter(self.members))
        return len(self.members[first]), len(self.others[first])

    @property
    def real(self) -> dict[str, Attack]:
        """The attacks, without the control."""
        return {name: one for name, one in self.attacks.items() if name != START}

    @property
    def rows_differ(self) -> bool:
        """Whether even the start model, which has not seen any of the rows, tells them apart."""
        return self.attacks[START].tells_apart

    def best(self) -> tuple[str, Attack]:
        """The attack with the largest share of caught rows at the lowest rate that can be measured, then by AUC."""
        return max(self.real.items(), key=lambda pair: (_first_share(pair[1]), pair[1].auc))


@dataclass(frozen=True)
class FoundSecret:
    """A planted secret.

    Attributes:
        times: number of training rows that hold it.
        trained, start: its exposure by the trained model, and by the model before training.
    """

    times: int
    trained: Exposure
    start: Exposure


@dataclass(frozen=True)
class Findings:
    """All that the attacks found.

    Attributes:
        epsilon, delta: what the run states; None without a guarantee.
        profile: all pairs of epsilon and delta that hold.
        unit: whose presence the run hides, in words.
        membership: of rows, and of authors if they are the unit and known.
        known: held-out rows that were left out.
        secrets: the planted secrets; empty if none were given.
        copied: passages of texts; None if there are no texts.
    """

    epsilon: float | None
    delta: float | None
    profile: Profile
    unit: str
    membership: Sequence[Membership]
    known: int
    secrets: Sequence[FoundSecret] = ()
    copied: Copied | None = None

    def allowed(self, false_alarms: float) -> float | None:
        """The largest share that any attack may catch; None without a guarantee."""
        return allowed_share(false_alarms, self.profile) if self.profile else None

    def contradictions(self) -> list[str]:
        """Lines about attacks that catch more than epsilon allows, whatever chance does; empty if all is well."""
        return [
            f"{name} on {one.of}: at least {percent(caught.sure_share)} caught at {percent(caught.false_alarms)} false "
            f"alarms, and epsilon allows at most {percent(allowed_share(caught.sure_alarms, self.profile))}"
            for one in self.membership
            for name, found in one.real.items()
            for caught in found.caught
            if caught is not None and self.contradicts(caught)
        ]

    def contradicts(self, caught: Caught) -> bool:
        """Whether a rate is beyond what epsilon allows, with confidence SURE for it and for its false alarms."""
        return bool(self.profile) and caught.sure_share > allowed_share(caught.sure_alarms, self.profile)

    def given_away(self) -> int:
        """Number of secrets that the trained model ranks higher than chance explains."""
        return sum(one.trained.chance * len(self.secrets) <= FOUND_CHANCE for one in self.secrets)

    def verdict(self) -> list[str]:
        """What all of it means, in plain sentences."""
        lines = [_of_membership(one) for one in self.membership]
        if any(one.rows_differ for one in self.membership):
            lines.append(
                "Careful: the start model, which has seen none of these rows, tells them apart too. The held-out rows "
                "are of another kind, so part of this is no sign of training. Give held-out rows like the training's."
            )
        if self.secrets:
            best = max(one.trained.bits for one in self.secrets)
            lines.append(
                f"{self.given_away()} of {len(self.secrets)} planted secrets are given away (the most exposed by "
                f"{best:.1f} bits)."
            )
        if self.copied is not None:
            longest = int(self.copied.train.max())
            compared = "passages with training rows than with held-out rows, beyond chance"
            told = f"longer {compared}: the model copies" if self.copied.copies else f"no longer {compared}"
            lines.append(f"Texts of the model share {told} (the longest has {longest} words).")
        if self.contradictions():
            lines += [f"CONTRADICTION: {line}." for line in self.contradictions()]
            lines.append(
                "Do not publish this model. Either the stated epsilon does not hold for these rows, or the held-out "
                "rows are of another kind than the training rows."
            )
        lines.append(
            "These attacks are a lower limit: a better attacker may find more. Only epsilon holds against all."
        )
        return lines


def percent(share: float) -> str:
    """A share with two figures below ten per cent.

    >>> percent(0.01), percent(0.0012), percent(0.634), percent(1.0)
    ('1%', '0.12%', '63%', '100%')
    """
    value = 100 * share
    return f"{value:.0f}%" if value >= 10 else f"{value:.2g}%"


def _of_membership(one: Membership) -> str:
    name, best = one.best()
    if not any(found.beats_guessing for found in one.real.values()):
        return f"No attack tells training {one.of} from held-out {one.of} better than guessing does."
    caught = next((rate for rate in best.caught if rate is not None), None)
    if caught is None:
        return f"An attacker can tell training {one.of} from held-out {one.of} ({name}: AUC {best.auc:.3f})."
    return (
        f"An attacker who wrongly accuses {percent(caught.false_alarms)} of other {one.of} finds "
        f"{percent(caught.share)} of the training {one.of} ({name})."
    )


def _first_share(found: Attack) -> float:
    return next((one.share for one in found.caught if one is not None), 0.0)
