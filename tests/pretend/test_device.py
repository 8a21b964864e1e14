"""The pretend device itself: its memory, what it refuses, its random numbers, and what it counts."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import pretend_device
from tests.pretend_device import counted, moved
from tests.whole_models import whole_model

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a transposed slice": lambda x: x.t()[1:3],
    "a column": lambda x: x[:, 2],
    "every second row": lambda x: x[::2],
    "a permuted view": lambda x: x.view(2, 2, 6).permute(2, 0, 1),
    "windows": lambda x: x.unfold(1, 2, 2),
    "chosen strides": lambda x: x.as_strided((3, 2), (7, 2), 1),
    "a diagonal": lambda x: x.diagonal(),
    "a view of a view": lambda x: x[1:].t()[2:5].unflatten(0, (3, 1)).squeeze(1),
    "other bits": lambda x: x.view(torch.int32)[:, 1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_writing_through_a_view_changes_what_it_views(view: Callable[[Tensor], Tensor], device: torch.device) -> None:
    here, there = torch.arange(24.0).view(4, 6), torch.arange(24.0, device=device).view(4, 6)
    found, expected = view(there), view(here)
    assert (found.stride(), found.storage_offset()) == (expected.stride(), expected.storage_offset())
    for one in (expected, found):
        one.mul_(3)
        one[0] = 5
        one.add_(torch.ones_like(one))
    assert torch.equal(there.cpu(), here)
    assert torch.equal(found.cpu(), expected)
    assert there.data_ptr() == there.view(2, 12).data_ptr()


def test_results_keep_the_shape_and_the_strides_of_the_cpus(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for function in (torch.exp, lambda t: t.transpose(1, 2) * 2, lambda t: t.sum(1), lambda t: t.to(torch.float64)):
        expected, found = function(x), function(x.to(device))
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert torch.equal(found.cpu(), expected)


def test_an_output_that_grows_and_metadata_in_place(device: torch.device) -> None:
    x, out = torch.arange(6.0, device=device), torch.empty(0, device=device)
    torch.cat([x, x], out=out)
    assert out.tolist() == [*range(6)] * 2
    y = x.clone().resize_(2, 3).unsqueeze_(0).transpose_(1, 2)
    assert y.cpu().tolist() == [[[0, 3], [1, 4], [2, 5]]]
    z = torch.zeros(2, device=device)
    z.data = x
    z += 1
    assert x.tolist() == [1, 2, 3, 4, 5, 6]


def test_gradients_are_the_cpus(device: torch.device) -> None:
    torch.manual_seed(0)
    layer, rows = nn.Linear(5, 3), torch.randn(4, 5)
    F.gelu(layer(rows)).square().sum().backward()
    there = nn.Linear(5, 3).to(device)
    there.load_state_dict(layer.state_dict())
    F.gelu(there(rows.to(device))).square().sum().backward()
    assert torch.equal(there.weight.grad.cpu(), layer.weight.grad)
    assert type(there.weight) is nn.Parameter


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there + here,
        lambda there, here: there @ here.t(),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there.add_(here),
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: F.embedding(here.long(), there),
        lambda there, here: here.add(there),
    ],
)
def test_a_tensor_of_the_cpu_is_refused(mixed: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
    here = torch.ones(3, 3)
    mixed(here.clone(), here)
    with pytest.raises(RuntimeError, match=r"(?i)expected all tensors to be on the same device"):
        mixed(torch.ones(3, 3, device=device), here)


def test_a_number_of_the_cpu_is_not(device: torch.device) -> None:
    assert (torch.arange(4, device=device) & ((1 << 40) + 1)).tolist() == [0, 1, 0, 1]
    assert (torch.arange(2, device=device) * 0.5).dtype == torch.float32
    assert (torch.ones(3, device=device) * torch.tensor(2.0)).tolist() == [2, 2, 2]


def test_random_numbers_are_the_devices_own(device: torch.device) -> None:
    torch.manual_seed(3)
    expected = torch.randn(4), torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device=device).cpu(), expected[0])
    before = torch.get_rng_state()
    with torch.random.fork_rng(devices=[device], device_type=device.type):
        torch.manual_seed(9)
        torch.randn(100, device=device)
    assert torch.equal(torch.rand(4, device=device).cpu(), expected[1])
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="expected a generator of the device"):
        torch.randn(4, device=device).normal_(generator=torch.Generator())


WAITING: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "item": (lambda x: x[0].item(), 1),
    "bool": (lambda x: bool(x.sum() > 0), 1),
    "float": (lambda x: float(x[1]), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "to the host": (lambda x: x.cpu(), 1),
    "from the host": (lambda x: torch.ones(3).to(x.device), 1),
    "from the host, not pinned": (lambda x: torch.ones(3).to(x.device, non_blocking=True), 1),
    "from the host, pinned": (lambda x: torch.ones(3).pin_memory().to(x.device), 1),
    "from the host, without waiting": (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), 0),
    "nonzero": (lambda x: x.nonzero(), 1),
    "a mask": (lambda x: x[x > 1], 1),
    "indices": (lambda x: x[x.long()], 0),
    "indices on the host": (lambda x: x[torch.tensor([0, 1])], 1),
    "writing through a mask": (lambda x: x.index_put_((x > 1,), x[1:3].clone()), 1),
    "writing a number through a mask": (lambda x: x.index_put_((x > 1,), torch.tensor(0.0)), 0),
    "unique": (lambda x: x.unique(), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "arithmetic": (lambda x: (x * 2 + x).clamp(0, 1).where(x > 1, x).sum(), 0),
    "making": (lambda x: torch.zeros(3, device=x.device) + torch.arange(3, device=x.device), 0),
}


@pytest.mark.parametrize(("does", "waits"), WAITING.values(), ids=WAITING)
def test_waits_are_counted(does: Callable[[Tensor], object], waits: int, device: torch.device) -> None:
    x = torch.arange(4.0, device=device)
    with counted() as counts:
        does(x)
    assert counts.waits == waits, counts.by_wait
    assert all("tests/pretend/test_device.py:" in place for place in counts.by_wait)


OPERATIONS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "one": (lambda x: x + 1, 1),
    "in place": (lambda x: x.mul_(2), 1),
    "two": (lambda x: x.exp().sum(), 2),
    "views": (lambda x: x.view(2, 2).t()[0].detach().unsqueeze(0).expand(3, -1), 0),
    "a cast": (lambda x: x.double(), 1),
    "a cast to the same": (lambda x: x.float(), 0),
    "empty memory": (lambda x: torch.empty_like(x), 0),
    "zeros": (lambda x: torch.zeros_like(x), 1),
    "a value": (lambda x: x[0].item(), 0),
    "copying a view": (lambda x: x.view(2, 2).t().contiguous(), 1),
}


@pytest.mark.parametrize(("does", "operations"), OPERATIONS.values(), ids=OPERATIONS)
def test_operations_are_counted(does: Callable[[Tensor], object], operations: int, device: torch.device) -> None:
    x = torch.arange(4.0, device=device)
    with counted() as counts:
        does(x)
    assert counts.operations == operations, counts.by_operation


def test_the_backward_pass_counts_too_and_blocks_end(device: torch.device) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    total = (x * x).sum()
    with counted() as outer:
        with counted() as inner:
            total.backward()
        assert inner.operations >= 2
        x.detach().sum()
    assert outer.operations == inner.operations + 1
    x.detach().sum()
    assert outer.operations == inner.operations + 1


def test_a_moved_model_keeps_its_parameters_and_ties() -> None:
    model = whole_model("Llama, tied").requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    before = dict(model.named_parameters())
    moved(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(one is before[name] for name, one in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, one in model.named_parameters() if one.requires_grad] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert all(one.device.type == pretend_device.NAME for one in [*model.parameters(), *model.buffers()])


def test_memory_is_given_back(device: torch.device) -> None:
    kept = torch.ones(10, device=device)
    for _ in range(3 * pretend_device._SWEEP):
        kept = kept + 0
    gc.collect()
    assert len(pretend_device._memory._held) <= 2 * pretend_device._SWEEP
    assert kept.tolist() == [1] * 10


def test_torch_names_it_as_its_accelerator(device: torch.device) -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device(device.type)
