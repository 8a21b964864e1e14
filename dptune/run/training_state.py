"""What a checkpoint holds of a model and its optimizer, whole or in shards, and how both are put back.

A checkpoint of sharded weights can be resumed on another number of ranks, or without sharding, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dptune.iterate_average import IterateAverage
from dptune.run.checkpoint import TrainingState, save_checkpoint
from dptune.run.session import PrivateRun
from dptune.run.shards import Shards, load_shards, stored_shapes
from dptune.sharding import are_sharded, as_shard, local_part, own_rows, reshard

# Before a parameter's name, in the folder that all ranks write.
_WEIGHT, _STATE, _AVERAGE = "weight ", "optimizer ", "average "


def write_checkpoint(
    run: PrivateRun,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    keep: int | None,
    whole: Callable[[], dict[str, Tensor]] = dict,
    config: dict[str, Any] | None = None,
    more: Callable[[], Mapping[str, bytes]] = dict,
    average: IterateAverage | None = None,
) -> None:
    """Write a checkpoint of a run's last step. Every rank must call this. Sharded weights are written by all ranks.

    Args:
        run: the open run.
        model, optimizer, schedule: what it trains, and how.
        keep: see `save_checkpoint`.
        whole: () -> the weights to save, if they are not sharded.
        config: see `TrainingState`.
        more: () -> further files, see `save_checkpoint`.
        average: the average of the weights, if the run keeps one.

    Raises:
        InvalidArgument: the disk is full or fails; the other checkpoints are unchanged.
    """
    tensors, averages = sharded_tensors(model, optimizer), {} if average is None else average.tensors
    if tensors:
        tensors |= {f"{_AVERAGE}{name}": tensor for name, tensor in averages.items()}
    shards = Shards(tensors, run.ranks) if tensors else None
    if run.ranks.is_main:
        state = TrainingState(
            step=run.completed,
            ledger_steps=run.ledger.steps if run.ledger else 0,
            identity=run.identity,
            config=config or {},
            weights=whole() if shards is None else {},
            optimizer=without_shards(optimizer.state_dict()),
            schedule=schedule.state_dict(),
            mechanism=run.mechanism_state(),
            averaged=0 if average is None else average.count,
            average=averages if shards is None else {},
        )
        save_checkpoint(run.folder, state, run.ledger, keep=keep, shards=shards, more=more())
    elif shards is not None:
        shards.help()


def trained_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """{name: parameter that the optimizer changes}, in the model's order."""
    reshard(model)  # a layer whose shards are gathered holds other tensors
    changed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in changed}


def sharded_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The trained weights and the optimizer's states of a model with sharded trained weights; empty for others."""
    parameters = trained_by_name(model, optimizer)
    if not are_sharded(parameters.values()):
        return {}
    found: dict[str, Tensor] = {f"{_WEIGHT}{name}": parameter for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        states = optimizer.state[parameter]
        found |= {f"{_STATE}{name}.{key}": value for key, value in states.items() if _is_sharded(value)}
    return found


def without_shards(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict()` without the sharded tensors."""
    kept = {
        number: {key: value for key, value in own.items() if not _is_sharded(value)}
        for number, own in state["state"].items()
    }
    return state | {"state": kept}


def put_back(
    saved: TrainingState, model: nn.Module, optimizer: Optimizer, average: IterateAverage | None = None
) -> None:
    """Load the weights and the optimizer's state of a checkpoint, and their average. Every rank must call this.

    Raises:
        RuntimeError: the checkpoint is of another model.
        InvalidArgument: its average does not fit, see `IterateAverage.resume`.
    """
    parameters = trained_by_name(model, optimizer)
    averages = average.tensors if average is not None and average.resume(saved.step, saved.averaged) else {}
    if saved.shards is not None:
        state = _read_shards(saved.shards, saved.optimizer, parameters, optimizer, averages)
    elif are_sharded(parameters.values()):
        state = _cut(saved, parameters, optimizer)
    else:
        state = saved.optimizer
        weights = {name: value for name, value in saved.weights.items() if not name.endswith(".alpha")}
        if unexpected := model.load_state_dict(weights, strict=False).unexpected_keys:
            raise RuntimeError(f"the checkpoint is of another model: it has {unexpected[0]}")
    if saved.shards is None:
        for name, tensor in averages.items():
            local_part(tensor).copy_(own_rows(saved.average[name], tensor))
    optimizer.load_state_dict(state)


def _read_shards(
    folder: Path,
    state: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    averages: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Fill the parameters and their averages from shards; returns the optimizer's state with its tensors, sharded like
    the parameters."""
    wanted: dict[str, Tensor] = {f"{_WEIGHT}{name}": parameter for name, parameter in parameters.items()}
    wanted |= {f"{_AVERAGE}{name}": tensor for name, tensor in averages.items()}
    numbers, states = _numbers(parameters, optimizer), {number: dict(own) for number, own in state["state"].items()}
    for stored in stored_shapes(folder):
        name, _, key = stored.removeprefix(_STATE).rpartition(".")
        if stored.startswith(_STATE) and name in parameters:
            wanted[stored] = torch.zeros_like(parameters[name].detach())
            states.setdefault(numbers[name], {})[key] = wanted[stored]
    load_shards(folder, wanted)
    return state | {"state": states}


@torch.no_grad()
def _cut(saved: TrainingState, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
    """Fill this rank's shards from whole weights; returns the optimizer's state, cut in the same way."""
    if set(saved.weights) != set(parameters):
        other = sorted(set(saved.weights) ^ set(parameters))[0]
        raise RuntimeError(f"the checkpoint is of another model: only one of the two has {other}")
    states = {number: dict(own) for number, own in saved.optimizer["state"].items()}  # type: ignore[attr-defined]
    numbers = _numbers(parameters, optimizer)
    for name, parameter in parameters.items():
        whole: Any = parameter
        whole.to_local().copy_(own_rows(saved.weights[name], parameter))
        own = states.get(numbers[name], {})
        for key, value in own.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                own[key] = as_shard(own_rows(value, parameter), parameter)
    return saved.optimizer | {"state": states}


def _numbers(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, int]:
    """{name: the number of the parameter in the optimizer's `state_dict()`}."""
    order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    return {name: order.index(id(parameter)) for name, parameter in parameters.items()}


def _is_sharded(value: object) -> bool:
    return isinstance(value, Tensor) and are_sharded([value])
