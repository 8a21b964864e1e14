"""A pretend accelerator: a device of torch's own kind, in Python, whose memory and arithmetic are the CPU's.

A machine without an accelerator cannot show three faults that every accelerator shows: a tensor that was made on the
CPU meets one on the device, the host waits for the device, and a step runs more kernels than it needs. Here they show.
The device takes the place that torch keeps for other vendors' devices (PrivateUse1).

- Numbers are real. Each operation runs on CPU tensors that share the memory of the device's tensors, strides included,
  so writing through a view changes what it views.
- A CPU tensor with dimensions next to a tensor of the device raises, as on CUDA; a single number is welcome.
- `counted` counts the operations, and the waits: what the host cannot go on without. Those are values that it reads
  (`item`, `bool`), results whose shape depends on values (`nonzero`, indexing with a mask, `unique`), and copies in
  either direction, unless one to the device is `non_blocking` and from pinned memory.
- The device has random numbers of its own, which `torch.manual_seed` seeds like the CPU's.

torch must know the device before its first backward pass, and no process forgets it. So tests on it run in processes of
their own: see `tests/test_pretend_device.py`.

What it does not have: more than one stream, an allocator (nothing runs out of memory), `torch.Generator(device=...)`,
fused kernels. Pinned memory is memory that `pin_memory` returned; `is_pinned` does not know it. It builds on an
experimental hook of torch, `_setup_privateuseone_for_python_backend`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
ROOT = Path(__file__).resolve().parents[1]
M = TypeVar("M", bound=nn.Module)

_aten = torch.ops.aten
_CPU = torch.device("cpu")
# Kernels of the CPU that only make a tensor's description, so they also serve the device.
_VIEWS = (
    _aten.as_strided.default,
    _aten.view.default,
    _aten._reshape_alias.default,
    _aten.unfold.default,
    _aten.set_.source_Storage,
    _aten.set_.source_Storage_storage_offset,
    _aten.set_.source_Tensor,
)
_INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # their masks are looked at apart
_SWEEP = 4096  # storages, at least, before dead ones are looked for
_libraries: list[torch.library.Library] = []  # a kernel lives as long as its library


@dataclass(eq=False)
class Counts:
    """What happened inside a `counted` block.

    Attributes:
        by_operation: {operation: how often it ran}; making a view or empty memory is none.
        by_wait: {what the host waited for, and where in the project: how often}.
    """

    by_operation: Counter[str] = field(default_factory=Counter)
    by_wait: Counter[str] = field(default_factory=Counter)

    @property
    def operations(self) -> int:
        """Number of operations, each at least one kernel on a real device."""
        return self.by_operation.total()

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return self.by_wait.total()


_counting: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """Count operations and waits inside the block, on all threads."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def register() -> torch.device:
    """Make the device known to torch, once per process, and return it."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        every.fallback(_run, "PrivateUse1")
        for view in _VIEWS:
            own.impl(view, _on_description(view), "PrivateUse1")
        own.impl(_aten.empty.memory_format, _empty, "PrivateUse1")
        own.impl(_aten.empty_strided.default, _empty_strided, "PrivateUse1")
        own.impl(_aten._copy_from.default, _copy_from, "PrivateUse1")
        own.impl(_aten._pin_memory.default, _pinned.copied, "CPU")
        _libraries.extend((every, own))
    return torch.device(NAME, 0)


def moved(model: M) -> M:
    """Move a model to the device as `to` moves one to CUDA: each parameter stays the same object, tied ones too.

    For vendors' devices torch otherwise makes new parameters, which unties shared ones.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(register())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def is_on_device(value: object) -> bool:
    """Whether it is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


class _Event:
    """A point in a stream, which has always been reached."""

    def record(self, _stream: object = None) -> _Event:
        return self


class _Stream:
    """The order of operations. The device has one: each operation ends before the next."""

    def __init__(self, _device: object = None, priority: int = 0) -> None:
        del priority

    def wait_event(self, _event: object) -> None:
        """Nothing to wait for."""

    wait_stream = wait_event

    def record_event(self, _event: object = None) -> _Event:
        return _Event()


class _Module(_DummyBackendModule):
    """`torch.pretend`: what torch asks a device's module for."""

    Event, Stream = _Event, _Stream

    def __init__(self) -> None:
        self._random = torch.Generator().get_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, _device: object = None) -> _Stream:
        return _Stream()

    def stream(self, _stream: object) -> AbstractContextManager[None]:
        return nullcontext()

    def manual_seed_all(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, _device: object = None) -> Tensor:
        return self._random.clone()

    def set_rng_state(self, state: Tensor, _device: object = None) -> None:
        self._random = state.clone()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The CPU's generator continues the device's random numbers inside the block."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(before)


class _Memory:
    """The CPU storage that holds the values of each of the device's storages."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._sweep_at = _SWEEP

    def given(self, values: torch.UntypedStorage) -> torch.UntypedStorage:
        """A new storage of the device over the memory of a CPU storage, which is kept as long as it lives."""
        self._sweep()
        made = torch._C._construct_storage_from_data_pointer(values.data_ptr(), register(), values.nbytes())
        self._held[made._cdata] = StorageWeakRef(made), values
        return made

    def of(self, tensor: Tensor) -> torch.UntypedStorage:
        """The CPU storage behind a tensor of the device."""
        return self._held[tensor.untyped_storage()._cdata][1]

    def _sweep(self) -> None:
        if len(self._held) >= self._sweep_at:
            self._held = {key: held for key, held in list(self._held.items()) if not held[0].expired()}
            self._sweep_at = max(_SWEEP, 2 * len(self._held))


class _Pinned:
    """The CPU's storages that were pinned."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}

    def copied(self, tensor: Tensor, _device: object = None) -> Tensor:
        """What `pin_memory` returns."""
        made = tensor.clone()
        self._held = {key: held for key, held in self._held.items() if not held.expired()}
        self._held[made.untyped_storage()._cdata] = StorageWeakRef(made.untyped_storage())
        return made

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held


_memory = _Memory()
_pinned = _Pinned()


def values_of(tensor: Tensor) -> Tensor:
    """A CPU tensor that shares the memory of a tensor of either."""
    return _values(tensor) if is_on_device(tensor) else tensor


def _values(tensor: Tensor) -> Tensor:
    """A CPU tensor that shares the memory and the strides of a tensor of the device."""
    empty = torch.empty(0, dtype=tensor.dtype, device=_CPU)
    return empty.set_(_memory.of(tensor), tensor.storage_offset(), tensor.size(), tensor.stride())


def _described(like: Tensor, storage: torch.UntypedStorage, shell: Tensor | None = None) -> Tensor:
    """A tensor of the device, or `shell` made into it, with the dtype, shape and strides of the CPU tensor `like`."""
    if shell is None:
        shell = torch._C._acc.create_empty_tensor((0,), like.dtype)
    place = (storage, like.storage_offset(), list(like.size()), list(like.stride()))
    _aten.set_.source_Storage_storage_offset.redispatch(_cpu_kernels(), shell, *place)
    return shell


def _on_device(values: Tensor) -> Tensor:
    """A tensor of the device over the memory of a CPU tensor."""
    return _described(values, _memory.given(values.untyped_storage()))


def _cpu_kernels() -> Any:
    return torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _on_description(view: OpOverload) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return view.redispatch(_cpu_kernels(), *args, **kwargs)

    return kernel


def _empty(size: Sequence[int], *, dtype: torch.dtype | None = None, memory_format: Any = None, **_: Any) -> Tensor:
    return _on_device(
        torch.empty(size, dtype=dtype, device=_CPU, memory_format=memory_format or torch.contiguous_format)
    )


def _empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _on_device(torch.empty_strided(size, stride, dtype=dtype, device=_CPU))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """source -> target, at least one of which is on the device."""
    count_operation("aten::copy_")
    if not is_on_device(target):
        _count_wait("a copy to the host")
    elif not is_on_device(source) and not (non_blocking and _pinned.holds(source)):
        _count_wait("a copy from the host")
    source_values, target_values = (_values(one) if is_on_device(one) else one for one in (source, target))
    target_values.copy_(source_values)
    return target


def _run(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Every other operation: run it on the CPU tensors that share the device's memory."""
    _refuse_mixture(op, args, kwargs)
    shells: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the CPU tensor, with the device's

    def unwrapped(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == NAME:
            return _CPU
        if not is_on_device(value):
            return value
        own = _values(value)
        shells[id(own)] = own, value
        return own

    plain_args, plain_kwargs = tree_map(unwrapped, (args, kwargs))
    plain_args = _with_tensors(op, plain_args)
    _count_waits_of(op, args)
    with _randomness(op, kwargs):
        out = op(*plain_args, **plain_kwargs)
    storages = {own.untyped_storage()._cdata: shell for own, shell in shells.values()}
    is_view = not op._schema.is_mutable and any(
        isinstance(one, Tensor) and one.untyped_storage()._cdata in storages for one in tree_leaves(out)
    )
    if not is_view and op is not _aten._local_scalar_dense.default:
        count_operation(op._schema.name)
    if op._schema.is_mutable:
        for own, shell in shells.values():
            _follow(own, shell)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in shells:
            return shells[id(value)][1]
        seen = storages.get(value.untyped_storage()._cdata)
        return _on_device(value) if seen is None else _described(value, seen.untyped_storage())

    return tree_map(wrapped, out)


def _with_tensors(op: OpOverload, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments with tensors where the operation wants tensors and torch hands over plain numbers."""
    if torch._C._should_allow_numbers_as_tensors(op._schema.name.removeprefix("aten::")):
        return args
    first = next((one for one in tree_leaves(args) if isinstance(one, Tensor)), None)
    return [
        torch.tensor(given, dtype=torch.result_type(first, given), device=_CPU)
        if first is not None and isinstance(given, (bool, int, float)) and str(argument.type) == "Tensor"
        else given
        for given, argument in zip(args, op._schema.arguments, strict=False)
    ]


def _follow(own: Tensor, shell: Tensor) -> None:
    """Give the device's tensor the shape that an operation gave its CPU tensor."""
    same = own.untyped_storage()._cdata == _memory.of(shell)._cdata
    if not same or own.untyped_storage().nbytes() != shell.untyped_storage().nbytes():
        _described(own, _memory.given(own.untyped_storage()), shell)
    elif (own.size(), own.stride(), own.storage_offset()) != (shell.size(), shell.stride(), shell.storage_offset()):
        _described(own, shell.untyped_storage(), shell)


def _refuse_mixture(op: OpOverload, args: Any, kwargs: Any) -> None:
    for one in tree_leaves((args, kwargs)):
        if isinstance(one, Tensor) and not is_on_device(one) and one.dim():
            if op._schema.name in _INDEXING and not one.is_floating_point():  # torch copies such indices by itself
                if op._schema.name != "aten::index":  # which is counted where the copy is made
                    _count_wait("a copy from the host")
                continue
            raise RuntimeError(
                f"{op}: expected all tensors to be on the same device, but a tensor of shape {tuple(one.shape)} is on "
                f"{one.device} and others on {NAME}"
            )


@contextmanager
def _randomness(op: OpOverload, kwargs: Any) -> Iterator[None]:
    """The device's own random numbers, for operations that draw some."""
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{op}: expected a generator of the device {NAME}, but found one of the CPU")
    if torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    with torch.get_device_module(NAME).drawing():
        yield


def _count_waits_of(op: OpOverload, args: Any) -> None:
    """An operation makes the host wait if its result is no tensor, or has a shape that depends on values."""
    if op._schema.name in _INDEXING:
        # Reading with a mask asks for `nonzero` itself. Writing one number through a mask needs no indices.
        is_number = len(args) > 2 and isinstance(args[2], Tensor) and not args[2].dim() and not is_on_device(args[2])
        masks = [one for one in args[1] if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)]
        if masks and len(args) > 2 and not is_number:
            _count_wait("the indices of a mask")
    elif torch.Tag.data_dependent_output in op.tags:
        _count_wait("a value")
    elif torch.Tag.dynamic_output_shape in op.tags:
        _count_wait(f"the shape of {op._schema.name}")


def count_operation(name: str) -> None:
    """Count one inside each `counted` block that is open."""
    for counts in _counting:
        counts.by_operation[name] += 1


def _count_wait(reason: str) -> None:
    if _counting:
        place = f"{reason}, {_place()}"
        for counts in _counting:
            counts.by_wait[place] += 1


def _place() -> str:
    """The innermost line of the project, outside this file, that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and path.is_relative_to(ROOT) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "in no line of the project"
