"""Optimizers that were tried and left out of the product, for `benchmarks.quality`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dptune.optimizers import DPAdam, LowPassAdam
from utils.training import loop
from utils.training.optimizers import UpdateSettings


def shrunk(matrix: Tensor, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors of a noisy matrix, with its singular values after optimal shrinkage.

    Gavish and Donoho 2017, for the Frobenius norm: values that noise of this standard deviation could make are 0.

    Args:
        matrix: [m, n].
        std: of the independent noise on each value.
    """
    m, n = sorted(matrix.shape)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    if std == 0:
        return u, values, v
    beta, y = m / n, values / (std * math.sqrt(n))
    kept = (((y**2 - beta - 1) ** 2 - 4 * beta).clamp_min(0)).sqrt() / y.clamp_min(1e-12)
    return u, torch.where(y > 1 + math.sqrt(beta), kept, torch.zeros_like(y)) * std * math.sqrt(n), v


class Orthogonal(torch.optim.Optimizer):
    """Muon: matrices move by their momentum with all singular values 1 (Jordan et al. 2024); the rest by DP-Adam.

    Args:
        params: parameters to train.
        noise_std: see `DPAdam`.
        lr: learning rate.
        shrink: whether the noise's share of each singular value is taken off: s becomes shrunk(s) / s instead of 1.
        momentum: decay of the momentum.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        noise_std: Callable[[], float],
        *,
        lr: float,
        shrink: bool,
        momentum: float,
    ) -> None:
        super().__init__([one for one in params if one.ndim == 2], {"lr": lr})
        rest = [one for one in params if one.ndim != 2]
        self._rest = DPAdam(rest, noise_std, lr=lr) if rest else None
        self._noise_std, self._shrink, self._momentum, self._variance = noise_std, shrink, momentum, 0.0

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        """One update from `.grad`."""
        beta = self._momentum
        self._variance = beta**2 * self._variance + (1 - beta) ** 2 * self._noise_std() ** 2
        for group in self.param_groups:
            for one in group["params"]:
                mean = self.state[one].setdefault("momentum", torch.zeros_like(one)).lerp_(one.grad, 1 - beta)
                if self._shrink:
                    u, values, v = shrunk(mean, math.sqrt(self._variance))
                    raw = torch.linalg.svdvals(mean).clamp_min(1e-12)
                    direction = (u * (values / raw)) @ v
                else:
                    u, _, v = torch.linalg.svd(mean, full_matrices=False)
                    direction = u @ v
                one.add_(direction, alpha=-group["lr"] * math.sqrt(max(1.0, one.shape[0] / one.shape[1])))
        if self._rest is not None:
            self._rest.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            self._rest.step()


class ShrunkAdam(DPAdam):
    """DP-Adam whose first moment loses what noise could have made of its singular values."""

    _spread = 0.0

    def step(self, closure: Any = None) -> Any:
        """One update from `.grad`."""
        beta = self.param_groups[0]["betas"][0]
        self._spread = beta**2 * self._spread + (1 - beta) ** 2 * self._noise_std() ** 2
        return super().step(closure)

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        before = parameter.detach().clone()
        super()._update(parameter, grad, group)
        if parameter.ndim != 2:
            return
        state = self.state[parameter]
        mean = state["exp_avg"]
        u, values, v = shrunk(mean, math.sqrt(self._spread))
        clean = (u * values) @ v
        ratio = torch.where(mean.abs() > 1e-12, clean / mean, torch.zeros_like(mean))
        parameter.copy_(before + (parameter - before) * ratio)


class FloorAdam(DPAdam):
    """DP-Adam whose minimum divisor is what noise alone leaves in it: s (2 (1 - beta2) / (1 + beta2))^(1/4)."""

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        beta2 = group["betas"][1]
        floor = math.sqrt(self._variance) * (2 * (1 - beta2) / (1 + beta2)) ** 0.25
        super()._update(parameter, grad, {**group, "floor": max(group["floor"], floor)})


def _make(name: str, settings: UpdateSettings, parameters: Sequence[nn.Parameter], noise: Callable[[], float]) -> Any:
    rate = settings.learning_rate
    if name in ("muon", "muon-shrunk"):
        return Orthogonal(parameters, noise, lr=rate, shrink=name == "muon-shrunk", momentum=0.95)
    if name == "adam-shrunk":
        return ShrunkAdam(parameters, noise, lr=rate)
    if name.startswith("lowpass-adam-"):
        first, second = map(float, name.removeprefix("lowpass-adam-").split("-"))
        return LowPassAdam(parameters, lr=rate, betas=(first, second))
    if name.startswith("floor-adam-"):
        first, second = map(float, name.removeprefix("floor-adam-").split("-"))
        return FloorAdam(parameters, noise, lr=rate, betas=(first, second))
    if name.startswith("adam-betas-"):
        first, second = map(float, name.removeprefix("adam-betas-").split("-"))
        return torch.optim.AdamW(parameters, lr=rate, betas=(first, second), weight_decay=0)
    if name.startswith("dp-adam-betas-"):
        first, second = map(float, name.removeprefix("dp-adam-betas-").split("-"))
        return DPAdam(parameters, noise, lr=rate, betas=(first, second))
    if name.startswith("dp-adam-floor-"):
        return DPAdam(parameters, noise, lr=rate, floor=float(name.removeprefix("dp-adam-floor-")))
    raise ValueError(f"tried: {name!r} is not known")


@contextmanager
def optimizer_tried(name: str | None) -> Iterator[None]:
    """Training loops of this process make the optimizer of that name; None changes nothing."""
    if name is None:
        yield
        return

    def make(
        settings: UpdateSettings,
        parameters: Sequence[nn.Parameter],
        noise_std: Callable[[], float],
        head: Collection[nn.Parameter] = (),
    ) -> Any:
        if head:
            raise ValueError("a head with a rate of its own is not for optimizers that are tried")
        return _make(name, settings, parameters, noise_std)

    with patch.object(loop, "make_optimizer", make):
        yield
