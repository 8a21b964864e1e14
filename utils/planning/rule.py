"""How the loss of private training depends on steps and noise: a rule that was fitted to measured runs.

    loss = floor + learn T^-alpha + noise (r T^beta)^gamma

T is the number of steps, and r the noise over the batch (`dptune.run.plan.noise_batch_ratio`). The learning rate that
was best is log-linear in r, T and the number of noise bands. `benchmarks/fit_planner.py` fits the rule and writes
`rule.json`, which says on what it was fitted. Outside that range, and for other models, the rule is a guess.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dptune._files import atomic_write
from dptune._validate import refuse

RULE = Path(__file__).with_name("rule.json")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A fitted rule.

    Attributes:
        source: the model, what was trained and how, in words.
        data: the measured runs, as a path from the root of the repository.
        parameters: number of the model's parameters.
        whole: whether the model itself was trained, not adapters.
        start: loss before training, in nats per token.
        floor, learn, alpha, noise, beta, gamma: see the module's docstring.
        rate: (c, by_noise, by_steps, by_bands) of the best rate c r^by_noise T^by_steps bands^by_bands.
        steps, ratios: the smallest and the largest T and r of the runs.
        bands: the largest number of noise bands of the runs.
        error: root mean square of the errors for runs that were left out of the fit, in nats per token.
    """

    source: str
    data: str
    parameters: int
    whole: bool
    start: float
    floor: float
    learn: float
    alpha: float
    noise: float
    beta: float
    gamma: float
    rate: tuple[float, float, float, float]
    steps: tuple[int, int]
    ratios: tuple[float, float]
    bands: int
    error: float

    def loss(self, steps: float, ratio: float) -> float:
        """The loss of T `steps` with noise `ratio` r over the batch; a ratio of 0 for training without noise."""
        return self.floor + self.learn * steps**-self.alpha + self.noise * (ratio * steps**self.beta) ** self.gamma

    def kept(self, steps: float, ratio: float) -> float:
        """The share that is kept of what so many steps gain without noise: 1 is all, 0 or less is nothing learned."""
        gain = self.start - self.loss(steps, 0.0)
        return (self.start - self.loss(steps, ratio)) / gain if gain > 0 else 0.0

    def ratio_that_keeps(self, share: float, steps: float) -> float:
        """The noise over the batch with which `kept` is `share`."""
        lost = (1 - share) * (self.start - self.loss(steps, 0.0))
        return float((max(lost, 0.0) / self.noise) ** (1 / self.gamma) / steps**self.beta)

    def learning_rate(self, steps: float, ratio: float, bands: int) -> float:
        """The best rate of the fitted model."""
        factor, by_noise, by_steps, by_bands = self.rate
        return float(factor * ratio**by_noise * steps**by_steps * bands**by_bands)

    def outside(self, steps: float, ratio: float, bands: int) -> list[str]:
        """What lies outside the range of the fit, in words."""
        found = []
        if not self.steps[0] <= steps <= self.steps[1]:
            found.append(f"{steps:,} steps")
        if not self.ratios[0] <= ratio <= self.ratios[1]:
            found.append(f"noise over batch {ratio:.2g}")
        if bands > self.bands:
            found.append(f"{bands} noise bands")
        return found

    @property
    def in_words(self) -> str:
        """What it was fitted on."""
        (least, most), (low, high) = self.steps, self.ratios
        ranges = f"{least} to {most} steps, noise over batch {low:.2g} to {high:.2g}, up to {self.bands} noise bands"
        return f"fitted on {self.source}: {ranges}"


def write_rule(path: str | os.PathLike[str], rule: Rule) -> None:
    """Write a rule as JSON, numbers with six figures."""
    short = {name: _short(value) for name, value in asdict(rule).items()}
    with atomic_write(path) as file:
        json.dump(short, file, indent=2)
        file.write("\n")


def read_rule(path: str | os.PathLike[str] = RULE) -> Rule:
    """The rule of a file.

    Raises:
        InvalidArgument: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        given = {one.name: found[one.name] for one in fields(Rule)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse("rule", str(path), f"holds no fitted rule ({type(error).__name__}); run benchmarks/fit_planner.py")
    for name in ("rate", "steps", "ratios"):
        given[name] = tuple(given[name])
    return Rule(**given)


def _short(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
