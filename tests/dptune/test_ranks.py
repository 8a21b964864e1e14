"""The sum over ranks is the same on all ranks, sends the stated number of bytes, and differing parameters are found."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dptune import ranks
from dptune._validate import InvalidArgument
from dptune.ranks import Ranks, bytes_sent, checksum_of, require_equal, sum_over_ranks
from tests.ranks import run_ranks

Gather = Callable[[Tensor], Tensor]


def shares_of(world_size: int, size: int, seed: int = 0) -> list[Tensor]:
    """Float32 vectors of very different magnitudes, so that another order of adding gives another rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * 10.0**rank for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("gathered_at_once", [1, 7, 12, 100, 1 << 24])
def test_a_gather_adds_in_float64_and_gives_every_rank_the_same(
    world_size: int, gathered_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_GATHERED_ELEMENTS", gathered_at_once)
    shares = shares_of(world_size, 33)
    sent: list[list[int]] = [[] for _ in range(world_size)]

    def work(rank: int, gather: Gather) -> Tensor:
        def counting(part: Tensor) -> Tensor:
            sent[rank].append(len(part))
            return gather(part)

        sum_over_ranks(shares[rank], world_size=world_size, gather=counting)
        return shares[rank]

    expected = torch.zeros(33, dtype=torch.float64)
    for share in shares:
        expected += share
    assert all(torch.equal(found, expected.float()) for found in run_ranks(world_size, work))
    for parts in sent:
        assert max(parts) <= max(1, gathered_at_once // world_size)
        # The bytes that a rank sends to all others; in a ring it forwards the same number of bytes.
        assert bytes_sent(33, world_size=world_size) == 4 * sum(parts) * (world_size - 1)


def test_every_rank_learns_the_largest_number() -> None:
    def work(rank: int, gather: Gather) -> int:
        ranks_of = Ranks(rank, 3, gather=gather, broadcast=lambda value: value)
        return ranks_of.most([4, 9, 2][rank], torch.device("cpu"))

    assert run_ranks(3, work) == [9, 9, 9]
    assert Ranks().most(4, torch.device("cpu")) == 4


def test_one_rank_keeps_its_vector() -> None:
    own = torch.arange(3.0)
    sum_over_ranks(own)
    assert own.tolist() == [0, 1, 2]


@pytest.mark.parametrize("how", ["gather", "reduce"])
def test_values_on_a_grid_are_added_exactly(how: str) -> None:
    """In float32 the sum would depend on which rank holds the large value: 2^25 + 1 - 2^25 is 0 or 1."""
    shares = [torch.tensor([2.0**25]), torch.tensor([1.0]), torch.tensor([-(2.0**25)])]

    def work(rank: int, gather: Gather) -> float:
        def reduce(share: Tensor) -> Tensor:
            return gather(share).view(3, -1).sum(0)

        total = shares[rank].clone()
        sum_over_ranks(total, world_size=3, **({"gather": gather} if how == "gather" else {"reduce": reduce}))
        return total.item()

    assert run_ranks(3, work) == [1.0] * 3


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_reduce_is_used_when_there_is_one_and_equals_the_gather(world_size: int) -> None:
    shares = shares_of(world_size, 50)

    def work(rank: int, gather: Gather) -> tuple[Tensor, Tensor, int]:
        calls: list[int] = []
        reduced, gathered = shares[rank].clone(), shares[rank].clone()

        def reduce(share: Tensor) -> Tensor:
            calls.append(len(share))
            return gather(share).view(world_size, -1).flip(0).sum(0)

        sum_over_ranks(reduced, world_size=world_size, reduce=reduce)
        sum_over_ranks(gathered, world_size=world_size, gather=gather)
        assert calls == [50]
        return reduced, gathered, len(calls)

    for reduced, gathered, _ in run_ranks(world_size, work):
        assert torch.equal(reduced, gathered)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_ring_reduce_sends_what_is_stated(world_size: int) -> None:
    """Count the parts that a ring of ranks sends: one per rank and turn, N - 1 turns to add and N - 1 to share."""
    size = 24 * world_size
    held = [list(share.split(24)) for share in shares_of(world_size, size)]
    total = sum(shares_of(world_size, size))
    sent = [0] * world_size
    for turn in range(2 * (world_size - 1)):
        moving = [(rank - turn) % world_size for rank in range(world_size)]
        parts = [held[rank][part].clone() for rank, part in enumerate(moving)]
        for rank, (part, values) in enumerate(zip(moving, parts, strict=True)):
            sent[rank] += 8 * len(values)
            other = held[(rank + 1) % world_size]
            other[part] = other[part] + values if turn < world_size - 1 else values
    for own in held:
        torch.testing.assert_close(torch.cat(own), total, rtol=1e-5, atol=1e-2)
    assert set(sent) == {bytes_sent(size, world_size=world_size, reduce=True)}


def test_several_ranks_need_a_way_to_meet() -> None:
    with pytest.raises(InvalidArgument, match="must communicate"):
        sum_over_ranks(torch.ones(2), world_size=2)


DTYPES = [torch.float32, torch.bfloat16, torch.float64]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((2, 3), (3, 2), (5,))]


@pytest.fixture(params=[1 << 20, 4])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and in chunks that end within parameters."""
    monkeypatch.setattr(ranks, "_CHECKED_AT_ONCE", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_is_in_the_fingerprint(dtype: torch.dtype) -> None:
    seen = {checksum_of(parameters(dtype)).item()}
    count = 1
    for number, parameter in enumerate(parameters(dtype)):
        for place in range(parameter.numel()):
            for bit in range(8 * parameter.element_size()):
                changed = parameters(dtype)
                words = changed[number].view(_INTEGERS[parameter.element_size()]).view(-1)
                words[place] ^= torch.tensor(1).to(words.dtype) << bit
                seen.add(checksum_of(changed).item())
                count += 1
    assert len(seen) == count


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_parameters_have_equal_fingerprints(dtype: torch.dtype) -> None:
    whole = checksum_of(parameters(dtype))
    assert whole.shape == (1,)
    assert whole.dtype == torch.int64
    assert torch.equal(whole, checksum_of(parameters(dtype)))
    assert torch.equal(whole, checksum_of([nn.Parameter(values) for values in parameters(dtype)]))


def test_chunks_change_no_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checksum_of(parameters())
    for chunk in (1, 4, 15, 16):
        monkeypatch.setattr(ranks, "_CHECKED_AT_ONCE", chunk)
        assert torch.equal(checksum_of(parameters()), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", [(1.0, -1.0), (1.0, 2.0), (0.0, 1.0), (0.5, -2.0)])
@pytest.mark.parametrize("distance", [1, 2, 3, 2048, 4096])
def test_two_values_that_change_places_are_noticed(
    dtype: torch.dtype, pair: tuple[float, float], distance: int
) -> None:
    """Such values differ in a few high bits, which a product with an even number shifts out of the 64 bits."""
    values = torch.zeros(2, 5000, dtype=dtype)
    values[:, 7], values[:, 7 + distance] = torch.tensor([pair, pair[::-1]], dtype=dtype).T
    assert checksum_of([values[0]]) != checksum_of([values[1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_parameters_that_change_places_are_noticed(dtype: torch.dtype) -> None:
    first, second, third = parameters(dtype)
    second = second.view(2, 3)
    assert checksum_of([first, second, third]) != checksum_of([second, first, third])
    ones = torch.ones(1024, dtype=dtype)
    assert checksum_of([ones, -ones]) != checksum_of([-ones, ones])


@given(places=st.lists(st.integers(0, 63), min_size=2, max_size=8, unique=True), data=st.data())
@settings(max_examples=100, deadline=None)
def test_small_changes_do_not_cancel(places: list[int], data: st.DataObject) -> None:
    """Ranks that drift apart differ in a few lowest bits, which often cancel in a weighted sum of bits."""
    values = torch.linspace(0.5, 2.0, 64)
    changed = values.clone()
    for place in places:
        changed.view(torch.int32)[place] += data.draw(st.sampled_from([-3, -2, -1, 1, 2, 3]))
    assert checksum_of([values]) != checksum_of([changed])


def test_changes_that_cancel_in_a_weighted_sum_are_noticed() -> None:
    """3 more at the first place and 1 less at the fourth cancel in a sum of bits times 3, 5, 7, 9."""
    values = torch.linspace(0.5, 2.0, 8)
    changed = values.clone()
    changed.view(torch.int32)[0] += 3
    changed.view(torch.int32)[3] -= 1
    assert checksum_of([values]) != checksum_of([changed])


@pytest.mark.parametrize("differing", [[], [2], [1, 2], [0]])
def test_ranks_with_other_parameters_are_named_on_every_rank(differing: list[int]) -> None:
    def work(rank: int, gather: Gather) -> str:
        own = copy.deepcopy(parameters())
        if rank in differing:
            own[1][0, 0] += rank + 1
        try:
            require_equal(own, gather)
        except RuntimeError as error:
            return str(error)
        return ""

    named = {(): "", (2,): "rank 2 ", (1, 2): "rank 1, 2 ", (0,): "rank 1, 2 "}[tuple(differing)]
    found = run_ranks(3, work)
    assert len(set(found)) == 1
    assert found[0].startswith(f"the trained parameters of {named}differ from rank 0's" if named else "")
    assert bool(found[0]) == bool(differing)
