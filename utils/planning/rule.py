"""How the loss of private training depends on steps and noise: a rule that was fitted to measured runs.

    loss = start - kept (start - floor - learn T^-alpha),    kept = 1 / (1 + (noise r T^beta)^gamma)

T is the number of steps, and r the noise over the batch (`dptune.run.noise_ratios.noise_batch_ratio`). The bracket is
how much T steps lower the loss without noise. `kept` is the share of it that is left with noise: 1 without noise, near
0 with much noise. The logarithm of the best learning rate is linear in those of r, T and the number of noise bands.
`benchmarks/fit_planner.py` fits the rule and writes `rule.json`, which says what it was fitted on. Outside that range,
and for other models, the rule is a guess.
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
        gain = self.start - self.floor - self.learn * steps**-self.alpha
        return self.start - self.kept(steps, ratio) * max(0.0, gain)

    def kept(self, steps: float, ratio: float) -> float:
        """The share of these steps' gain without noise that is left with noise `ratio` over the batch."""
        return float(1 / (1 + (self.noise * ratio * steps**self.beta) ** self.gamma))

    def ratio_that_keeps(self, share: float, steps: float) -> float:
        """The noise over the batch with which `kept` is `share`."""
        return float((1 / share - 1) ** (1 / self.gamma) / (self.noise * steps**self.beta))

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
        bands = "independent noise" if self.bands == 1 else f"up to {self.bands} noise bands"
        ranges = f"{least} to {most} steps, noise over batch {low:.2g} to {high:.2g}, {bands}"
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
