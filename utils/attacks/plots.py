"""The plots of an attack's page, as SVG images in data URLs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from utils.attacks.allowed import Profile, allowed_share
from utils.attacks.membership import roc
from utils.synthetic.plots import drawn_image

_SMALLEST = 1e-3  # the axes begin there, or at one held-out row if that is less
_POINTS = 300
_BINS = 40
_TRAINING, _HELD_OUT, _START = "#D55E00", "#0072B2", "#999999"
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


def plot_roc(members: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray], profile: Profile) -> str:
    """Share of training rows caught by false alarms, both logarithmic, with what epsilon allows.

    Args:
        members, others: scores by attack, [M] and [N].
        profile: pairs of epsilon and delta; empty draws no limit.
    """
    counts = [len(one) for scores in (members, others) for one in scores.values()]
    low = min(_SMALLEST, 1 / max(counts))
    rates = np.geomspace(low, 1, _POINTS)

    def draw(axes: Axes) -> None:
        for name, color in zip(members, _COLORS, strict=False):
            wrong, right = roc(members[name], others[name])
            axes.step(np.maximum(wrong, low), np.maximum(right, low), where="post", color=color, label=name)
        axes.plot(rates, rates, color="black", linestyle=":", linewidth=1, label="guessing")
        if profile:
            limits = [allowed_share(rate, profile) for rate in rates]
            axes.plot(rates, limits, color="black", linewidth=1.5, label="most that epsilon allows")
        axes.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1.05))
        axes.set(xlabel="false alarms (share of held-out rows)", ylabel="caught (share of training rows)")

    return drawn_image(draw)


def plot_scores(members: np.ndarray, others: np.ndarray, label: str) -> str:
    """Histograms of one score for training rows [M] and held-out rows [N]."""
    edges = np.histogram_bin_edges(np.concatenate([members, others]), bins=_BINS)

    def draw(axes: Axes) -> None:
        for values, name, color in ((members, "training", _TRAINING), (others, "held out", _HELD_OUT)):
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, bins=edges.tolist(), weights=weights, histtype="step", color=color, label=name)
        axes.set(xlabel=label, ylabel="share of rows")

    return drawn_image(draw)


def plot_exposures(trained: Sequence[float], start: Sequence[float], most: float) -> str:
    """Exposure of each secret in bits, under the trained model and before training; `most` is the largest possible."""

    def draw(axes: Axes) -> None:
        places = np.arange(1, len(trained) + 1)
        axes.bar(places - 0.2, start, width=0.4, color=_START, label="before training")
        axes.bar(places + 0.2, trained, width=0.4, color=_TRAINING, label="trained")
        axes.axhline(most, color="black", linestyle=":", linewidth=1, label="found at the first guess")
        axes.set_xticks(places.tolist())
        axes.set(xlabel="secret", ylabel="exposure in bits", ylim=(0, 1.05 * most))

    return drawn_image(draw)
