"""A step checks that it was fed its sampler's draw; what was not shown is in the ledger and in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import GaussianNoise, InvalidArgument, Keystream, Ledger, PoissonSampler, PrivacyConfig, PrivateStep
from dptune._words import counted
from dptune.accounting import Cut, Spend, compose
from dptune.keystream import FIXED, new_key
from dptune.report.statement import PrivacyStatement, state_privacy
from dptune.sampling import FIXED_KEY, NOT_SHOWN, SAMPLER, checksum_of_items
from dptune.units.batches import AuthorSampler
from tests.private_sum import sum_so_far
from tests.ranks import run_ranks

CONFIG = PrivacyConfig(
    num_examples=40, expected_batch_size=10, steps=20, clip_norm=1.0, noise_multiplier=1.0, delta=1e-3
)


def a_step(folder: Path, sampler: PoissonSampler | None, model: nn.Module, **others: Any) -> PrivateStep:
    ledger = Ledger(folder / "ledger.jsonl") if others.get("rank", 0) == 0 else None
    return PrivateStep(model, CONFIG, ledger=ledger, sampler=sampler, **others)


def a_sampler(**how: Any) -> PoissonSampler:
    return PoissonSampler(CONFIG.num_examples, CONFIG.sampling_probability, **how)


def losses(model: nn.Module, count: int) -> Tensor:
    made: Tensor = model(torch.ones(count, 3))[:, 0]
    return made


def stated(folder: Path, step: PrivateStep) -> PrivacyStatement:
    return state_privacy(CONFIG, Ledger(folder / "ledger.jsonl"), step.noise, privacy_unit="one row")


def test_a_step_that_is_fed_its_draw_in_parts_has_a_guarantee(tmp_path: Path) -> None:
    model, sampler = nn.Linear(3, 1), a_sampler()
    with a_step(tmp_path, sampler, model) as step:
        for _ in range(3):
            for part in np.array_split(sampler.draw(), 3):
                step.backward(losses(model, len(part) + 2), items=part)  # two rows fill up
            step.finish()
        statement = stated(tmp_path, step)
    assert (statement.guarantee, statement.sampler) == ("dp", SAMPLER)
    assert "sampler" not in (tmp_path / "ledger.jsonl").read_text(), "lines are as they were"


WRONG = {
    "a row twice": lambda draw: [draw, draw[:1]],
    "a row left out": lambda draw: [draw[1:]],
    "another row": lambda draw: [draw[1:], [next(row for row in range(40) if row not in draw)]],
    "the same number of others": lambda draw: [[row for row in range(40) if row not in draw][: len(draw)]],
    "nobody": lambda _: [],
}


@pytest.mark.parametrize("how", WRONG)
def test_a_step_that_is_fed_anything_else_releases_nothing(how: str, tmp_path: Path) -> None:
    model, sampler = nn.Linear(3, 1), a_sampler(keystream=Keystream.for_tests(1))
    with a_step(tmp_path, sampler, model) as step:
        for items in WRONG[how](sampler.draw()):
            step.backward(losses(model, max(len(items), 1)), items=items)
        with pytest.raises(RuntimeError, match="the draw holds"):
            step.finish()
        assert model.weight.grad is None
    assert Ledger(tmp_path / "ledger.jsonl").steps == 0


def test_each_draw_is_used_once_and_in_order(tmp_path: Path) -> None:
    model, sampler = nn.Linear(3, 1), a_sampler(keystream=Keystream.for_tests(1))
    first, second = sampler.draw(), sampler.draw()
    with a_step(tmp_path, sampler, model) as step:
        step.backward(losses(model, len(first)), items=first)
        step.finish()
        step.backward(losses(model, len(second)), items=second)
        step.finish()
        with pytest.raises(RuntimeError, match="this step has no draw"):
            step.finish()


def test_a_micro_batch_must_name_its_rows(tmp_path: Path) -> None:
    model, sampler = nn.Linear(3, 1), a_sampler()
    drawn = sampler.draw()
    with a_step(tmp_path, sampler, model) as step:
        with pytest.raises(RuntimeError, match="name the drawn items"):
            step.backward(losses(model, 3))
        with pytest.raises(RuntimeError, match=r"items in a micro-batch of 1 units"):
            step.backward(losses(model, 1), items=range(len(drawn) + 2))


def test_units_without_a_number_add_nothing(tmp_path: Path) -> None:
    model, sampler = nn.Linear(3, 1), a_sampler(keystream=Keystream.for_tests(1))
    with a_step(tmp_path, sampler, model) as step:
        step.backward(losses(model, 5), items=[])
        assert not sum_so_far(step).any()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("examples", "q"), [(40, 1.0), (40, 0.125), (4, 0.25), (400, 0.25)])
def test_a_sampler_of_other_settings_than_the_configuration_is_refused(
    examples: int, q: float, rank: int, tmp_path: Path
) -> None:
    """Draws of everybody had a stated epsilon of 0.455, which is that of one in a hundred; the true one is 28.4."""
    with pytest.raises(InvalidArgument, match=rf"^sampler=.*{examples} examples.* {q}.*config.num_examples"):
        a_step(
            tmp_path, PoissonSampler(examples, q), nn.Linear(3, 1), rank=rank, world_size=2, gather=lambda part: part
        )
    assert not (tmp_path / "ledger.jsonl").exists()


def test_an_author_sampler_is_refused_because_its_authors_are_the_draw(tmp_path: Path) -> None:
    authors = AuthorSampler(a_sampler(), [np.array([author]) for author in range(40)], 1, mean=True)
    with pytest.raises(InvalidArgument, match=r"^sampler=AuthorSampler: .*\.authors"):
        a_step(tmp_path, authors, nn.Linear(3, 1))  # type: ignore[arg-type]
    with a_step(tmp_path, authors.authors, nn.Linear(3, 1)) as step:
        assert step.config.num_examples == len(authors.rows)


@pytest.mark.parametrize("steps", [1, 20])
def test_without_a_sampler_the_report_guarantees_nothing(steps: int, tmp_path: Path) -> None:
    """The same row in each of 20 steps had a stated epsilon of 0.281; the true one is 25.9."""
    model = nn.Linear(3, 1)
    with a_step(tmp_path, None, model) as step:
        for _ in range(steps):
            step.backward(losses(model, 1))
            step.finish()
        statement = stated(tmp_path, step)
    assert (statement.guarantee, statement.epsilon, statement.sampler) == ("none", None, NOT_SHOWN)
    assert statement.reasons[0].startswith(f"nothing shows that {counted(steps, 'step')} got Poisson draws")


def test_a_sampler_under_a_fixed_key_guarantees_nothing_and_resuming_does_not_hide_it(tmp_path: Path) -> None:
    model, sampler = nn.Linear(3, 1), a_sampler(keystream=Keystream.for_tests(1))
    with a_step(tmp_path, sampler, model) as step:
        drawn = sampler.draw()
        step.backward(losses(model, len(drawn)), items=drawn)
        step.finish()
    secret = a_sampler()
    with a_step(tmp_path, secret, model) as step:
        drawn = secret.draw()
        step.backward(losses(model, len(drawn) + 1), items=drawn)
        step.finish()
        statement = stated(tmp_path, step)
    assert statement.guarantee == "none"
    assert statement.reasons == (
        "the batches of 1 step were drawn under a fixed key, so anyone can tell who was drawn",
    )
    assert [json.loads(line).get("sampler") for line in (tmp_path / "ledger.jsonl").read_text().splitlines()] == [
        FIXED_KEY,
        None,
    ]


def test_noise_under_a_fixed_key_guarantees_nothing_and_resuming_does_not_hide_it(tmp_path: Path) -> None:
    """The report of a second launch, with secret noise, stated an epsilon over the steps of both."""
    model, fixed = nn.Linear(3, 1), GaussianNoise(4, Keystream.for_tests(1))
    for noise in (fixed, None):
        sampler = a_sampler()
        with a_step(tmp_path, sampler, model, noise=noise) as step:
            drawn = sampler.draw()
            step.backward(losses(model, len(drawn) + 1), items=drawn)
            step.finish()
            statement = stated(tmp_path, step)
        assert (statement.guarantee, statement.epsilon) == ("none", None)
        assert statement.reasons == ("the noise of 1 step came from a fixed key, so anyone can reproduce it",)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line.get("noise_key") for line in lines] == [FIXED, None]


@pytest.mark.parametrize("fixed_rank", [0, 1])
def test_the_ledger_knows_of_a_fixed_key_on_any_rank(fixed_rank: int, tmp_path: Path) -> None:
    """One fixed key is enough: anyone who has it can subtract that rank's noise from the sum."""
    key = new_key()

    def work(rank: int, gather: Any) -> None:
        model, sampler = nn.Linear(3, 1), a_sampler(keystream=Keystream.shared(key))
        noise = GaussianNoise(4, Keystream.for_tests(1) if rank == fixed_rank else Keystream.from_os())
        own = sampler.draw()[rank::2]
        with a_step(tmp_path, sampler, model, gather=gather, rank=rank, world_size=2, noise=noise) as step:
            step.backward(losses(model, len(own) + 1), items=own)
            step.finish()

    run_ranks(2, work)
    assert Ledger(tmp_path / "ledger.jsonl").noise_keys == {FIXED: 1}


@pytest.mark.parametrize("fault", [None, "twice"])
def test_ranks_compare_what_they_were_fed_together(fault: str | None, tmp_path: Path) -> None:
    def work(rank: int, gather: Any) -> str:
        model, sampler = nn.Linear(3, 1), a_sampler(keystream=Keystream.for_tests(1))
        nn.init.ones_(model.weight)
        own = sampler.draw()[rank::2] if fault is None else sampler.draw()[: 5 * rank + 1]
        with a_step(tmp_path, sampler, model, gather=gather, rank=rank, world_size=2) as step:
            step.backward(losses(model, len(own)), items=own)
            try:
                step.finish()
            except RuntimeError as error:
                return str(error)
        return "released"

    for found in run_ranks(2, work):
        assert found == "released" if fault is None else "the draw holds" in found


def test_checksums_of_parts_add_up_and_tell_sets_apart() -> None:
    chance = np.random.default_rng(0)
    sets = [np.sort(chance.choice(1000, 20, replace=False)) for _ in range(300)]
    assert len({checksum_of_items(items) for items in sets}) == 300
    for items in sets[:20]:
        parts = sum(np.int64(checksum_of_items(part)).astype(np.uint64) for part in np.array_split(items, 3))
        assert int(np.uint64(parts).astype(np.int64)) == checksum_of_items(items)
    assert checksum_of_items(np.array([], dtype=np.int64)) == 0


def test_a_draw_cannot_be_skipped(tmp_path: Path) -> None:
    """A loop that dropped draws until one pleased it would not be Poisson sampling."""
    model, sampler = nn.Linear(3, 1), a_sampler()
    first, second = sampler.draw(), sampler.draw()
    with a_step(tmp_path, sampler, model) as step:
        step.backward(losses(model, len(second) + 1), items=second)
        with pytest.raises(RuntimeError, match=f"the draw holds {len(first)} examples"):
            step.finish()
    assert not (tmp_path / "ledger.jsonl").exists()
    public = {name for name in dir(sampler) if not name.startswith("_")}
    settings = {"keystream", "max_batch", "name", "noise_bands", "num_examples", "parts", "sampling_probability"}
    assert public == {"draw"} | settings


def test_a_step_that_is_fed_its_cut_draw_has_a_guarantee_that_counts_the_cut(tmp_path: Path) -> None:
    config, model = replace(CONFIG, max_batch=11), nn.Linear(3, 1)
    sampler = PoissonSampler(40, 0.25, max_batch=11)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with PrivateStep(model, config, ledger=ledger, sampler=sampler) as step:
        for _ in range(3):
            draw = sampler.draw()
            step.backward(losses(model, len(draw) + 1), items=draw)
            step.finish()
        statement = state_privacy(config, ledger, step.noise, privacy_unit="one row")
        with pytest.raises(InvalidArgument, match="has draws cut at Cut"):
            state_privacy(CONFIG, ledger, step.noise, privacy_unit="one row")
    assert (statement.guarantee, statement.sampler) == ("dp", "Poisson, cut at 11 examples")
    assert ledger.spends == [Spend(1.0, 0.25, 3, 1, Cut(11, 40))]
    assert statement.epsilon == compose(ledger.spends, delta=1e-3) > compose([Spend(1.0, 0.25, 3)], delta=1e-3)


def test_a_step_that_is_fed_the_whole_draw_where_it_was_cut_releases_nothing(tmp_path: Path) -> None:
    config, model = replace(CONFIG, max_batch=10), nn.Linear(3, 1)
    cut, whole = (PoissonSampler(40, 0.25, Keystream.for_tests(5), max_batch=most) for most in (10, None))
    with PrivateStep(model, config, ledger=Ledger(tmp_path / "ledger.jsonl"), sampler=cut) as step:
        draw = whole.draw()
        assert len(draw) > len(cut.draw()) == 10
        step.backward(losses(model, len(draw)), items=draw)
        with pytest.raises(RuntimeError, match="the draw holds 10 examples"):
            step.finish()
