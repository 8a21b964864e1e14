"""Weights sharded over ranks with FSDP2 (Zhao et al. 2023).

Each decoder layer is one group, which is gathered when it computes and dropped afterwards. The rest of the model
(embeddings, last norm, output layer) is the root group. Each rank reads only its own rows from the checkpoint's
safetensors files, so no process ever holds a whole copy.

Adapters are attached after sharding and stay ordinary tensors, which every rank holds whole: FSDP neither shards nor
averages them. If the model's own weights are trained instead, each rank trains its shards (`dptune.sharded_sum`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dptune._validate import HIDDEN, refuse
from dptune.devices import can_pin

_WHOLE_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"

_T = TypeVar("_T", bound=Callable[..., object])


@dataclass(frozen=True)
class ShardedBytes:
    """Bytes of weights: `held` by this rank, `total` of the whole model, `root` in the root group."""

    held: int
    total: int
    root: int

    def require_bound(self, ranks: int) -> None:
        """Check that this rank holds at most total / ranks plus the root group; otherwise something is not sharded.

        Raises:
            RuntimeError: it holds more.
        """
        bound = self.total / ranks + self.root
        if self.held > bound:
            raise RuntimeError(f"{self.held:,} bytes of weights on this rank, more than the {bound:,.0f} of a shard")


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    device: torch.device,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> None:
    """Shard each of `layers` as a group over all ranks, and the rest of `model` as the root group.

    Args:
        model: a model with all parameters frozen, on the meta device (`load_slices` fills it later) or in memory. It is
            changed in place; attach adapters, or make parameters trainable, afterwards.
        layers: the decoder layers.
        device: the device that computes.
        cpu_offload: keep the shards in CPU memory and copy a layer to the GPU when it computes.
        reshard_after_forward: drop a layer's gathered weights until the backward pass needs them.

    Raises:
        InvalidArgument: a parameter is trainable (an adapter would be sharded too), or there is no layer.
    """
    trained = next((name for name, parameter in model.named_parameters() if parameter.requires_grad), None)
    if trained is not None:
        refuse("model", trained, "is trainable: shard a frozen model, and choose what is trained afterwards")
    if not layers:
        refuse("model", type(model).__name__, "has no decoder layer that could be sharded; train it without FSDP")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    offload = CPUOffloadPolicy(pin_memory=can_pin(device)) if cpu_offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, offload_policy=offload, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, offload_policy=offload)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to `model`."""
    return isinstance(model, FSDPModule)


def holds_shards(model: nn.Module) -> bool:
    """Whether any part of `model` is sharded, also while its weights are gathered."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or are_sharded(model.parameters())


def local_part(value: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or the whole tensor if it is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def original_class_name(module: nn.Module) -> str:
    """The class name without the prefix that FSDP gives to what it shards."""
    return type(module).__name__.removeprefix("FSDP")


def compute_device(model: nn.Module) -> torch.device:
    """Where `model` computes. With CPU offload its weights are elsewhere, but its buffers are there."""
    tensor = next(chain(model.buffers(), model.parameters()))
    return tensor.device


def rows_of_ranks(rows: int, ranks: int) -> list[int]:
    """How many of a parameter's rows each rank holds. FSDP shards like torch.chunk: the last ranks have fewer."""
    most = -(-rows // ranks)
    return [min(most, max(0, rows - rank * most)) for rank in range(ranks)]


def mesh_of(parameters: Iterable[Tensor]) -> DeviceMesh | None:
    """The ranks that any of these parameters is sharded over; None if this rank holds all of them whole."""
    return next((parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)), None)


def are_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether this rank holds only its shard of any of these parameters."""
    return mesh_of(parameters) is not None


def own_rows(whole: Tensor, parameter: Tensor) -> Tensor:
    """The rows of a tensor in a sharded parameter's shape that belong to this rank's shard, where the shard is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    rows: Tensor = whole.split(rows_of_ranks(len(whole), mesh.size()))[mesh.get_local_rank()]
    return rows.to(local_part(parameter).device, copy=True)  # a view would keep the whole tensor


def as_shard(local: Tensor, like: Tensor) -> Tensor:
    """This rank's rows as a tensor that is sharded like `like`."""
    if not isinstance(like, DTensor):
        return local
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def norms_over_ranks(norms: Tensor, mesh: DeviceMesh) -> Tensor:
    """Euclidean norms of vectors of which each rank of `mesh` holds a part, from the norms of this rank's parts."""
    squared = norms.to(mesh.device_type).square()
    dist.all_reduce(squared, group=mesh.get_group())
    return squared.sqrt()


def reshard(model: nn.Module) -> None:
    """Drop the gathered weights that a forward pass left. Call it only when no backward pass is to come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def as_forward(model: nn.Module, function: _T) -> _T:
    """`function`, run as if it were `model.forward`, so that it sees the whole weights of the root group.

    FSDP gathers a module's weights when that module is called. A function that only calls parts of the model (its
    backbone, then its output layer) would see sharded root weights.
    """
    if not isinstance(model, FSDPModule):
        return function
    name = f"_dptune_{function.__name__}"
    setattr(model, name, function)
    register_fsdp_forward_method(model, name)
    registered: _T = getattr(model, name)
    return registered


def weight_bytes(model: nn.Module, layers: Iterable[nn.Module]) -> ShardedBytes:
    """Bytes of the model's weights, without adapters, that this rank holds; a tied weight counts once."""
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    held = total = root = 0
    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            continue
        size = parameter.numel() * parameter.element_size()
        total += size
        root += 0 if id(parameter) in in_layers else size
        held += local_part(parameter).untyped_storage().nbytes()
    return ShardedBytes(held, total, root)


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """{name of a tensor: safetensors file that holds it} of a checkpoint folder, sharded or in one file.

    Raises:
        InvalidArgument: the folder has no safetensors files, or its index names a missing file.
    """
    index = folder / _INDEX_NAME
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in listed.items()}
        missing = sorted({str(path) for path in files.values() if not path.is_file()})
        if missing:
            refuse("folder", str(folder), f"its index names {missing[0]}, which is missing; download it again")
        return files
    whole = folder / _WHOLE_NAME
    if not whole.is_file():
        refuse("folder", str(folder), "has no safetensors, which sharding needs; write them with save_pretrained()")
    with safe_open(whole, "pt") as file:
        return dict.fromkeys(file.keys(), whole)


def load_slices(
    model: nn.Module, files: Mapping[str, Path], *, device: torch.device, prefix: str = "", apart: Collection[str] = ()
) -> None:
    """Fill a sharded model on the meta device. This rank reads only its own rows of every weight.

    Args:
        model: a model from `shard`. Buffers that are not in the checkpoint must already have their values.
        files: the file of each tensor, from `checkpoint_files`.
        device: the device of the shards: the CPU if they are offloaded.
        prefix: a prefix of names, such as "model.", that a checkpoint of the backbone alone lacks.
        apart: names of parameters that the caller fills, because the checkpoint has them in another form.

    Raises:
        InvalidArgument: the checkpoint lacks a weight or has it in another shape.
    """
    owners = {key: names for key, names in _owners(model).items() if names[0] not in apart}
    wanted: dict[Path, list[tuple[str, str]]] = {}
    for names in owners.values():
        key = _find_key(names, files, prefix)
        wanted.setdefault(files[key], []).append((names[0], key))
    state = model.state_dict()
    loaded: dict[str, Tensor] = {}
    for path, entries in wanted.items():
        with safe_open(path, "pt") as file:
            for name, key in entries:
                loaded[name] = _read(file.get_slice(key), state[name], device, name)
    model.load_state_dict(loaded, strict=False, assign=True)
    for first, *others in owners.values():
        for name in others:  # tied: one tensor under several names
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(first))
    model.requires_grad_(False)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """{id: all names} of each tensor of the state dict: parameters and persistent buffers."""
    owners: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), []).append(name)
    return owners


def _find_key(names: Sequence[str], files: Mapping[str, Path], prefix: str) -> str:
    """The checkpoint's name of the tensor that the model calls `names`."""
    candidates = [*names, *(name.removeprefix(prefix) for name in names), *(prefix + name for name in names)]
    key = next((candidate for candidate in candidates if candidate in files), None)
    if key is None:
        remedy = f"the checkpoint has no weight {names[0]}; load it with transformers and save it again"
        refuse("files", HIDDEN, remedy)
    return key


def _read(stored: Any, like: Tensor, device: torch.device, name: str) -> Tensor:
    """This rank's part of a stored tensor, with the sharding and dtype of `like`."""
    _require_shape(stored, tuple(like.shape), name)
    if not isinstance(like, DTensor):
        whole: Tensor = stored[...].to(device, like.dtype)
        return whole
    part = stored[_own_rows(like)].to(device, like.dtype)
    # A copy, so that the mapped file does not stay in memory.
    return from_rows(part.clone() if part.device.type == "cpu" else part, like)


def read_own_rows(
    files: Mapping[str, Path], name: str, like: DTensor, *, shape: tuple[int, ...], prefix: str = ""
) -> Tensor:
    """This rank's rows of a stored weight, as they are stored, on the CPU.

    Args:
        files, prefix: see `load_slices`.
        name: what the model calls the weight.
        like: a tensor of as many rows, sharded over the ranks.
        shape: what the weight's shape must be.

    Raises:
        InvalidArgument: the checkpoint lacks the weight or has it in another shape.
    """
    key = _find_key([name], files, prefix)
    with safe_open(files[key], "pt") as file:
        stored = file.get_slice(key)
        _require_shape(stored, shape, name)
        rows: Tensor = stored[_own_rows(like)]
        return rows


def from_rows(rows: Tensor, like: DTensor) -> DTensor:
    """The tensor of which each rank gives its own rows, sharded as `like` is."""
    placed: DTensor = DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed


def _own_rows(like: DTensor) -> slice:
    """The rows that FSDP keeps on this rank."""
    rank, rows = like.device_mesh.get_local_rank(), rows_of_ranks(like.shape[0], like.device_mesh.size())
    start = sum(rows[:rank])
    return slice(start, start + rows[rank])


def _require_shape(stored: Any, shape: tuple[int, ...], name: str) -> None:
    found = tuple(stored.get_shape())
    if found != shape:
        refuse("files", name, f"has shape {found} in the checkpoint, but {shape} by its configuration")
