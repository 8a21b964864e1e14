"""A small model with the kinds of layers that a run trains, in which every privacy unit moves other weights.

The layers stand side by side. Unit u reads its own token and picks output u of every layer. So the gradients of
different units are orthogonal, and each unit plays a game of its own in every step. The gradients are far longer than
the clip norm, so each is clipped to it exactly, which is the worst case that epsilon is stated for. Each unit has a
home layer, where nearly all of its gradient lies: a layer that is missing in a norm then shows.

Shapes: U units, L layers, B rows, T tokens, D inputs (as many as units), P all trained parameters, flat.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune.clipping import layers_of
from dptune.clipping_styles import Automatic, Clipping, PerLayer
from dptune.lora import adapters, add_lora, trainable_parameters

LORA, WHOLE = "lora", "whole"
_PICKED: dict[str, tuple[str, ...]] = {
    LORA: ("linear", "conv", "head"),
    WHOLE: ("embedding", "linear", "conv", "layer_norm", "rms_norm", "head"),
}
TRAINED = tuple(_PICKED)
_TOKENS, _RANK = (1.0, 0.5), 4  # what the units' inputs are multiplied by; the rank of adapters
_FAR = 1e3  # how much longer than the clip norm a gradient is, at least
_AWAY = 0.1  # the part of a unit's gradient in another layer than its home layer, over the part there


class Conv1D(nn.Module):
    """GPT-2's linear layer, x W + b with W [D, outputs], which the engine knows by this name."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    """Two layers in a module of their own, as a decoder has them, so that they can be sharded together."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(units, units), Conv1D(units, units)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"linear": self.linear(x), "conv": self.conv(x)}


class StandIn(nn.Module):
    """Units [B] -> the losses of their rows, [B].

    Args:
        units: U.
        trained: one of TRAINED: adapters of linear layers, or every weight of every layer.
        clipping: the clipping style.
        clip_norm: C.
        seed: of the weights, which are no secret.

    Raises:
        InvalidArgument: an unknown `trained`.
    """

    def __init__(self, units: int, trained: str, clipping: Clipping, clip_norm: float, *, seed: int = 0) -> None:
        super().__init__()
        if trained not in TRAINED:
            refuse("trained", trained, f"give one of {', '.join(TRAINED)}")
        self.units, self._clipping, self._clip_norm = units, clipping, clip_norm
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(units, units)
        self.block = Block(units)
        self.layer_norm = nn.LayerNorm(units)
        self.rms_norm = nn.RMSNorm(units)
        self.head = nn.Linear(units, units, bias=False)
        self.head.weight = self.embedding.weight  # tied, as in many language models
        self.x: Tensor
        self.wide: Tensor
        # Inputs of different units are orthogonal, or else their gradients of an adapter's A would not be.
        basis = nn.init.orthogonal_(torch.empty(units, units))
        self.register_buffer("x", basis[:, None, :] * torch.tensor(_TOKENS)[:, None])
        self.register_buffer("wide", torch.randn(units, len(_TOKENS), units))
        self._picked = _PICKED[trained]
        if trained == LORA:
            self.requires_grad_(False)
            add_lora(self, rank=_RANK, targets=self._picked)
            for _, adapter in adapters(self):
                nn.init.normal_(adapter.B.weight)
        torch.random.set_rng_state(state)
        self.weights: Tensor
        self.register_buffer("weights", torch.ones(units, len(self._picked)))
        self._set_weights()

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers."""
        return self._picked

    def home_of(self, unit: int) -> str:
        """The layer where nearly all of a unit's gradient lies."""
        return self._picked[unit % len(self._picked)]

    def forward(self, units_B: Tensor) -> Tensor:
        """The losses of one row of each of these units."""
        return (self._picks(units_B) * self.weights[units_B]).sum(1)

    def contributions(self) -> Tensor:
        """Every unit's clipped gradient over C, by plain autograd in float64, [U, P]; the oracle of an audit.

        P is in the order of `trainable_parameters`.
        """
        oracle = copy.deepcopy(self).double()
        parameters = [(name, one) for name, one in oracle.named_parameters() if one.requires_grad]
        found = [self._clipped(parameters, oracle(torch.tensor([unit]))[0]) for unit in range(self.units)]
        return torch.stack(found)

    def _picks(self, units_B: Tensor) -> Tensor:
        """Output u of every layer, summed over tokens, for each unit u: [B, L]."""
        x_BTD, wide_BTU = self.x[units_B], self.wide[units_B]
        outputs = {**self.block(x_BTD), "head": self.head(x_BTD)}
        if "embedding" in self._picked:
            outputs |= {"layer_norm": self.layer_norm(wide_BTU), "rms_norm": self.rms_norm(wide_BTU)}
            # Its output has no place for unit u: the token itself is the unit.
            outputs["embedding"] = self.embedding(units_B[:, None].expand(-1, len(_TOKENS))).sum(2, keepdim=True)
        picked = []
        for name in self._picked:
            output = outputs[name].sum(1)
            picked.append(output[:, 0] if name == "embedding" else output.gather(1, units_B[:, None])[:, 0])
        return torch.stack(picked, 1)

    def _set_weights(self) -> None:
        """Make each unit's gradient long in every layer, and longest at home."""
        oracle = copy.deepcopy(self).double()
        parameters = trainable_parameters(oracle)
        shortest = _FAR * max(self._clip_norm, 10 * getattr(self._clipping, "gamma", 0.0)) / _AWAY
        for unit in range(self.units):
            picks = oracle._picks(torch.tensor([unit]))[0]
            for number, name in enumerate(self._picked):
                grads = torch.autograd.grad(picks[number], parameters, retain_graph=True, allow_unused=True)
                norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads if grad is not None))
                self.weights[unit, number] = shortest / norm * (1.0 if name == self.home_of(unit) else _AWAY)

    def _clipped(self, parameters: list[tuple[str, nn.Parameter]], loss: Tensor) -> Tensor:
        names, values = zip(*parameters, strict=True)
        grads = dict(zip(names, torch.autograd.grad(loss, values), strict=True))
        if isinstance(self._clipping, PerLayer):
            layers = layers_of(names)
            share = 1 / math.sqrt(len(set(layers.values())))
            norms = {one: _norm([grads[name] for name in names if layers[name] == one]) for one in layers.values()}
            return torch.cat([(share / norms[layers[name]] * grads[name]).flatten() for name in names])
        norm = _norm(list(grads.values()))
        if isinstance(self._clipping, Automatic):
            norm += self._clipping.gamma
        return torch.cat([(grad / norm).flatten() for grad in grads.values()])


def _norm(grads: list[Tensor]) -> float:
    return math.sqrt(sum(float(grad.square().sum()) for grad in grads))
