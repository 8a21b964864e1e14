"""Optimizers for gradients with much noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dptune._validate import refuse, require_positive

_Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]  # as torch takes them


class _Adam(torch.optim.Optimizer):
    """What the optimizers here share: Adam's first moment, the decay of weights, and one update per parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin_step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
        mean, divisor, start = self._quotient(state, grad, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, divisor, value=-group["lr"] / start)

    def _begin_step(self) -> None:
        """Find what is the same for all parameters of a step."""

    def _quotient(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
        """(m, divisor, c): the update is m / (c * divisor). Averages the second moment; m is averaged already."""
        raise NotImplementedError


class DPAdam(_Adam):
    """AdamW without the noise's bias in the second moment (Tang et al. 2023, "DP-AdamBC").

    Noise of variance s^2 adds s^2 to the mean of squared gradients. With much noise, Adam then divides every coordinate
    by nearly the same number. Here s^2 is subtracted again: the update is m / sqrt(v - s^2), where m and v are Adam's
    bias-corrected moments. This post-processes private gradients, so it costs no privacy.

    Args:
        params: parameters to train, or groups of parameters with their own settings, as torch takes them.
        noise_std: () -> s, the standard deviation of the noise on each coordinate of this step's gradient
            (`PrivateStep.gradient_noise_std`).
        lr: learning rate.
        betas: decay rates of the two moments.
        floor: minimum divisor. It applies where noise hides the gradient, so that v - s^2 is near zero or below.
        weight_decay: decoupled weight decay, as in AdamW.

    Raises:
        InvalidArgument: a value outside its range.
    """

    def __init__(
        self,
        params: _Params,
        noise_std: Callable[[], float],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        _require_settings(lr, betas)
        require_positive("floor", floor)
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "weight_decay": weight_decay})
        self._noise_std, self._variance = noise_std, 0.0

    def _begin_step(self) -> None:
        self._variance = self._noise_std() ** 2

    def _quotient(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
        beta1, beta2 = group["betas"]
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # The bias is averaged like v itself, because the noise may differ between steps.
        before = 0.0 if state["step"] == 1 else state["noise_sq"]
        state["noise_sq"] = beta2 * before + (1 - beta2) * self._variance
        start1, start2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        divisor = ((square - state["noise_sq"]) / start2).clamp_min_(0).sqrt_().clamp_min_(group["floor"])
        return state["exp_avg"], divisor, start1


class LowPassAdam(_Adam):
    """AdamW whose second moment is that of averaged gradients (after Zhang et al. 2024, "DOPPLER").

    Adam divides by the root mean square of single gradients. Noise that is correlated over steps is large in each of
    them and nearly cancels in their average. So here v averages the squares of m, the bias-corrected first moment,
    instead of those of the gradient. The update is m / sqrt(v). This post-processes private gradients, so it costs no
    privacy.

    Args:
        params: parameters to train, or groups of parameters with their own settings, as torch takes them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the divisor.
        weight_decay: decoupled weight decay, as in AdamW.

    Raises:
        InvalidArgument: a value outside its range.
    """

    def __init__(
        self,
        params: _Params,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _require_settings(lr, betas)
        require_positive("eps", eps)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _quotient(
        self,
        state: dict[str, Any],
        grad: Tensor,  # noqa: ARG002  # its first moment has all that is needed
        group: dict[str, Any],
    ) -> tuple[Tensor, Tensor, float]:
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"] / (1 - beta1 ** state["step"])
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
        return mean, (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"]), 1.0


def _require_settings(lr: float, betas: tuple[float, float]) -> None:
    require_positive("lr", lr)
    for beta in betas:
        if not 0 <= beta < 1:
            refuse("betas", betas, "give two numbers of at least 0 and below 1")
