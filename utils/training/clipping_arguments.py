"""Flags of training: how per-example gradients are clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from dptune._validate import refuse
from dptune.clipping_styles import FLAT, Adaptive, Automatic, Clipping, PerLayer
from utils.cli.flags import naming

CLIPPING_STYLES = ("flat", "per-layer", "automatic", "adaptive")


@dataclass
class ClippingArguments:
    """How per-example gradients are clipped. In every style the noise is scaled by --clip_norm."""

    _argument_group_name = "clipping"

    clipping: str = field(
        default="flat",
        metadata={
            "help": "way to clip. flat: the whole gradient; per-layer: each layer's part; automatic: normalise every "
            "gradient; adaptive: the clip norm follows a private quantile of the norms",
            "choices": CLIPPING_STYLES,
        },
    )
    layer_clip_norms: list[str] | None = field(
        default=None,
        metadata={"help": "for per-layer: PATTERN=NORM for every trained layer; default: equal shares of --clip_norm"},
    )
    automatic_gamma: float = field(
        default=0.01, metadata={"help": "for automatic: a gradient g is scaled by clip_norm / (|g| + gamma)"}
    )
    adaptive_quantile: float = field(default=0.5, metadata={"help": "for adaptive: share of unclipped gradients"})
    adaptive_learning_rate: float = field(default=0.2, metadata={"help": "for adaptive: step size of log(clip norm)"})
    adaptive_count_noise: float | None = field(
        default=None,
        metadata={"help": "for adaptive: noise on the unclipped gradients' count; default: expected batch / 20"},
    )

    def __post_init__(self) -> None:
        if self.layer_clip_norms is not None and self.clipping != "per-layer":
            refuse("--layer_clip_norms", self.layer_clip_norms[0], "needs --clipping per-layer")

    def style(self, layers: Iterable[str]) -> Clipping:
        """The clipping style for a model with these trained layers."""
        if self.clipping == "per-layer":
            return PerLayer(
                None if self.layer_clip_norms is None else _by_layer(self.layer_clip_norms, sorted(set(layers)))
            )
        flags = {"gamma": "--automatic_gamma"}
        flags |= {name: f"--adaptive_{name}" for name in ("quantile", "learning_rate", "count_noise")}
        with naming(flags):
            if self.clipping == "automatic":
                return Automatic(self.automatic_gamma)
            if self.clipping == "adaptive":
                return Adaptive(self.adaptive_quantile, self.adaptive_learning_rate, self.adaptive_count_noise)
        return FLAT


def _by_layer(given: Sequence[str], layers: Sequence[str]) -> dict[str, float]:
    """{layer: clip norm} from PATTERN=NORM entries. A later pattern wins; every layer must match one."""
    found: dict[str, float] = {}
    for entry in given:
        pattern, _, norm = entry.rpartition("=")
        try:
            value = float(norm)
        except ValueError:
            refuse("--layer_clip_norms", entry, "give PATTERN=NORM, such as *.attn.*=0.5")
        matching = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if not matching:
            refuse("--layer_clip_norms", entry, f"matches no trained layer; their names are like {layers[0]}")
        found |= dict.fromkeys(matching, value)
    if missing := [layer for layer in layers if layer not in found]:
        refuse("--layer_clip_norms", given[-1], f"leaves out {len(missing)} trained layers such as {missing[0]}")
    return found
