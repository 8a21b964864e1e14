"""Whether a resumed run is the run that was saved: what both must share, compared value by value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from dptune._validate import HIDDEN, refuse
from dptune.lora import adapters
from dptune.run.plan import RunPlan
from dptune.sharding import local_part

_SAMPLED_VALUES = 16  # maximum per weight: enough to tell models apart, and fast to read
_MOST_DIFFERENCES, _LONGEST_VALUE = 5, 60  # limits for one line of error message


def refuse_other_run(
    saved: Mapping[str, object], current: Mapping[str, object], *, where: str = "the checkpoint"
) -> None:
    """Refuse to resume from a checkpoint of another run.

    Args:
        saved: the checkpoint's `identity`.
        current: the identity of the resumed run. Values with the same JSON are equal.
        where: where `saved` was found, for the message.

    Raises:
        InvalidArgument: they differ; the message names what differs, with both values.
    """
    before, now = (dict(_leaves(json.loads(json.dumps(identity)))) for identity in (saved, current))
    values = {key: (before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in now | before}
    differing = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if not differing:
        return
    told = [
        f"{_dotted(key)} was {_shown(old)} in {where} and is {_shown(new)} now"
        for key, (old, new) in list(differing.items())[:_MOST_DIFFERENCES]
    ]
    target: _Key = ("target_epsilon",)
    if ("noise_multiplier",) in differing and target not in differing and now.get(target) is not None:
        told[0] += " (with a target epsilon, other steps or another batch need other noise, so they must stay)"
    more = f", and {len(differing) - len(told)} more differ" if len(differing) > len(told) else ""
    remedy = "resume with the settings that the run began with, or begin a new run in a new folder"
    refuse("resume_from", HIDDEN, f"{', '.join(told)}{more}; {remedy}")


def mechanism_identity(plan: RunPlan) -> dict[str, object]:
    """{setting: value} of everything that decides a run's mechanism, as JSON values."""
    mechanism = plan.privacy
    return {
        **plan.unit.identity,
        "clipping": repr(mechanism.clipping) if mechanism else None,
        "clip_norm": mechanism.clip_norm if mechanism else None,
        "noise_multiplier": mechanism.noise_multiplier if mechanism else None,
        "delta": mechanism.delta if mechanism else None,
        "expected_batch_size": plan.expected_batch_size,
        "sampling_probability": plan.sampling_probability,
        "target_epsilon": plan.target_epsilon,
        "insecure_test_seed": plan.test_seed,
        "num_examples": plan.num_examples,
        **(plan.parts.identity if plan.parts else {}),
        **({"register": True} if plan.register else {}),  # not its path: the file may move
        **({} if plan.max_batch is None else {"max_batch": plan.max_batch}),
        **({"noise_bands": mechanism.noise_bands} if mechanism and mechanism.noise_bands > 1 else {}),
    }


def model_identity(model: nn.Module) -> dict[str, object]:
    """A fingerprint of the base model and the shapes of the trained parameters, as JSON values. Main process only."""
    shapes = {
        name: [adapter.rank, *adapter.B.weight.shape[:1], *adapter.A.weight.shape[1:], adapter.alpha]
        for name, adapter in adapters(model)
    }
    frozen = ((name, weight) for name, weight in model.named_parameters() if not weight.requires_grad)
    identity: dict[str, object] = {"base_model": weights_fingerprint(frozen), "adapters": shapes}
    trained = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora." not in name
    }
    return identity | ({"trained": trained} if trained or not shapes else {})


def weights_fingerprint(weights: Iterable[tuple[str, nn.Parameter]]) -> str:
    """SHA-256 over the name, shape and first values of each of these weights.

    Only the first row is read: rank 0 holds it, no matter how many ranks share the rest.
    """
    digest = hashlib.sha256()
    for name, parameter in weights:
        local = local_part(parameter)
        first = local.detach()[:1].flatten()[:_SAMPLED_VALUES].cpu()
        if first.is_floating_point():
            first = first.bfloat16()  # the same model in two precisions has one fingerprint
        digest.update(
            f"{name}{tuple(parameter.shape)}".encode() + first.contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


_ABSENT = object()
_Key = tuple[str | int, ...]


def _leaves(value: object, key: _Key = ()) -> Iterator[tuple[_Key, object]]:
    """(path, value) of every leaf of nested dictionaries and lists; an empty one is a leaf."""
    if value and isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*key, name))
    else:
        yield key, value


def _dotted(key: _Key) -> str:
    """("a", "b", 2) becomes `a.b[2]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _shown(value: object) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def num_trained(model: nn.Module) -> int:
    """The number of trained parameters of a model; the whole number if they are sharded."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
