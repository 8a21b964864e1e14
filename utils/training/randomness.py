"""Where a run's secret randomness comes from: one sampling key for all ranks, a noise key for each.

`--insecure_test_seed` makes both repeatable, and an interrupted run equal to one that was not. It protects nobody, and
the report says so.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dptune.keystream import Keystream, new_key
from dptune.noise import GaussianNoise
from dptune.sampling import PoissonSampler
from dptune.units.batches import AuthorSampler
from dptune.units.unit import Authors
from utils.training.plan import RunPlan


def make_sampler(
    plan: RunPlan, accelerator: Accelerator, authors: Authors | None = None, *, test_seed: int | None, completed: int
) -> PoissonSampler | AuthorSampler:
    """The same draws on every rank: the main process makes the key. Every rank calls it.

    Args:
        plan: examples and sampling probability.
        accelerator: the ranks.
        authors: who wrote which row; for plans that sample authors.
        test_seed: for repeatable draws, which go on behind `completed` steps; else they are fresh.
        completed: steps behind this run.
    """
    keys = [new_key() if accelerator.is_main_process else b""]
    keystream = Keystream.shared(broadcast_object_list(keys)[0])
    if test_seed is not None:
        keystream = Keystream.for_tests(f"{test_seed} sampling")
    poisson = PoissonSampler(plan.num_examples, plan.sampling_probability, keystream)
    sampler: PoissonSampler | AuthorSampler = poisson
    if plan.unit.samples_authors:
        assert authors is not None, "the data were loaded without the column of the privacy unit"
        sampler = AuthorSampler(poisson, authors.rows(), plan.unit.examples, mean=plan.unit.gradient == "mean")
    for _ in range(0 if test_seed is None else completed):
        sampler.draw()
    return sampler


def make_noise(size: int, rank: int, *, test_seed: int | None, completed: int) -> GaussianNoise:
    """This rank's own noise of `size` values a step; the other arguments are those of `make_sampler`."""
    if test_seed is None:
        return GaussianNoise(size)
    noise = GaussianNoise(size, Keystream.for_tests(f"{test_seed} noise of rank {rank}"))
    for _ in range(completed):
        noise.take()
    return noise
