"""How often an audit contradicts the engine as it is, and as it is with planted faults.

    python -m benchmarks.audit --seeds 200 --output benchmarks/results/NAME.md

A seed is one audit (`dptune.audit.mechanism`) with fresh keys of the operating system: nothing in it can be repeated.
Without a fault, none should be contradicted: 200 audits at a confidence of 0.9999 each have a false one with a
probability of at most 2%. With a fault, every one should be. The sharded setting runs in two gloo processes, the others
in this many workers.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.audit_faults import FAULTS, same_each_launch
from dptune._files import atomic_write
from dptune.audit.games import Launch, Mechanism, plan_of, play_rank
from dptune.audit.mechanism import Plan, Result, audit_mechanism
from dptune.audit.stand_in import WHOLE, StandIn
from dptune.ranks import Ranks
from dptune.sharding import shard

DELTA = 1e-5
_STEPS = 25  # of each launch
_AT_ONCE = 20  # seeds for which two processes are started
_SHARDED = "whole model, two sharded ranks"
_SHARED = "two sharded ranks that share a key"


@dataclass(frozen=True)
class Setting:
    """What is audited with many seeds.

    Attributes:
        mechanism: the mechanism.
        plan: how much is played.
        sharded: whether two processes share the trained weights.
    """

    mechanism: Mechanism
    plan: Plan
    sharded: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one audit found.

    Attributes:
        contradicted: whether anything was contradicted.
        by: the first question that was; "" if none.
        found, stated: the largest bound on epsilon over its stated value.
        seconds: how long it took.
    """

    contradicted: bool
    by: str
    found: float
    stated: float
    seconds: float


def _plan(q: float, composed: int = 10, steps: int = _STEPS) -> Plan:
    return Plan(sampling_probability=q, delta=DELTA, steps=steps, composed=composed)


SETTINGS = {
    "adapters": Setting(Mechanism(noise_multiplier=1.0), _plan(0.1)),
    "adapters, much noise": Setting(Mechanism(noise_multiplier=3.0), _plan(0.5, 12)),
    "adapters, little noise": Setting(Mechanism(noise_multiplier=0.6), _plan(0.02, 5)),
    "whole model": Setting(Mechanism(noise_multiplier=1.0, trained=WHOLE), _plan(0.1)),
    "authors of 3 rows": Setting(Mechanism(noise_multiplier=2.0, group_size=3), _plan(0.1)),
    _SHARDED: Setting(
        Mechanism(noise_multiplier=1.0, trained=WHOLE, ranks=2), _plan(1.0, composed=5, steps=20), sharded=True
    ),
}


def audit(setting: Setting, fault: str = "") -> Outcome:
    """One audit in this process, with a planted fault if one is named."""
    torch.set_num_threads(1)
    planted: Callable[[], AbstractContextManager[Any]] = FAULTS[fault][0] if fault else nullcontext
    began = time.perf_counter()
    with planted():
        result = audit_mechanism(setting.mechanism, setting.plan)
    return outcome_of(result, time.perf_counter() - began)


def outcome_of(result: Result, seconds: float) -> Outcome:
    """What a result says in one line of a table."""
    bounds = [one for one in result.findings if one.measured.startswith("epsilon")]
    sharp = max(bounds, key=lambda one: one.found / one.stated)
    by = result.findings[0].question if result.contradicted else ""
    return Outcome(result.contradicted, by, sharp.found, sharp.stated, seconds)


def audits_in_processes(rank: int, gather: Callable[[Tensor], Tensor], setting: Setting, seeds: int, fault: str) -> Any:
    """Audits of a model whose trained weights are sharded over gloo processes; every rank must call this."""
    torch.set_num_threads(1)
    ranks = Ranks(rank, dist.get_world_size(), gather=gather, broadcast=_broadcast)

    def player(mechanism: Mechanism, model: StandIn, *, sampling_probability: float, steps: int, block: int) -> Launch:
        own = copy.deepcopy(model).requires_grad_(False)
        shard(own, [own.block], device=torch.device("cpu"))
        own.requires_grad_(True)
        plan = plan_of(mechanism, sampling_probability, steps)
        with TemporaryDirectory() as folder:
            launch = play_rank(mechanism, own, plan, Path(folder), ranks, block, dummies=True)
        owners = gather(torch.from_numpy(launch.owners)).view(ranks.world_size, *launch.owners.shape)
        return replace(launch, owners=owners.amax(0).numpy())

    outcomes = []
    for _ in range(seeds):
        began = time.perf_counter()
        with same_each_launch() if fault else nullcontext():
            result = audit_mechanism(setting.mechanism, setting.plan, player)
        outcomes.append(outcome_of(result, time.perf_counter() - began))
    return outcomes


def _broadcast(value: object) -> object:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def outcomes_of(setting: Setting, seeds: int, pool: ProcessPoolExecutor | None, fault: str = "") -> list[Outcome]:
    """The outcomes of so many audits."""
    if not setting.sharded and pool is not None:
        return list(pool.map(audit, [setting] * seeds, [fault] * seeds))
    from tests.processes import run_processes

    found: list[Outcome] = []
    for start in range(0, seeds, _AT_ONCE):
        found += run_processes(2, audits_in_processes, setting, min(_AT_ONCE, seeds - start), fault)[0]
    return found


def honest_table(outcomes: dict[str, list[Outcome]]) -> list[str]:
    """A row for each setting, without faults."""
    lines = [
        "| setting | sigma | q | seeds | contradicted | sharpest bound on epsilon: median | largest | stated "
        "| s per seed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in outcomes.items():
        mechanism, plan = SETTINGS[name].mechanism, SETTINGS[name].plan
        found, seconds = [one.found for one in own], statistics.median(one.seconds for one in own)
        lines.append(
            f"| {name} | {mechanism.noise_multiplier:g} | {plan.sampling_probability:g} | {len(own)} | "
            f"{sum(one.contradicted for one in own)} | {statistics.median(found):.3f} | {max(found):.3f} | "
            f"{own[0].stated:.3f} | {seconds:.2f} |"
        )
    return lines


def fault_table(outcomes: dict[str, list[Outcome]]) -> list[str]:
    """A row for each planted fault."""
    lines = [
        "| planted fault | seeds | contradicted | first by | bound on epsilon: median | stated |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name, own in outcomes.items():
        first = Counter(one.by for one in own).most_common(1)[0][0] or "-"
        lines.append(
            f"| {name} | {len(own)} | {sum(one.contradicted for one in own)} | {first} | "
            f"{statistics.median(one.found for one in own):.3f} | {own[0].stated:.3f} |"
        )
    return lines


def faulty_setting(fault: str) -> Setting:
    """The setting that a fault is planted into."""
    _, ranks, of_draws = FAULTS[fault]
    return Setting(Mechanism(noise_multiplier=1.0, ranks=ranks), _plan(0.25 if of_draws else 1.0))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the audits that the command line asks for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="audits of each setting without a fault")
    parser.add_argument("--fault_seeds", type=int, default=5, help="audits of each planted fault")
    parser.add_argument("--workers", type=int, default=2, help="processes that audit at the same time")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--output", help="file for the tables; default: print them only")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        honest = {name: outcomes_of(SETTINGS[name], args.seeds, pool) for name in args.settings}
        faulty = {}
        if args.fault_seeds:
            faulty = {name: outcomes_of(faulty_setting(name), args.fault_seeds, pool, name) for name in FAULTS}
            faulty[_SHARED] = outcomes_of(SETTINGS[_SHARDED], args.fault_seeds, pool, _SHARED)
    lines = ["# Audits of the mechanism", "", "## The engine as it is", "", *honest_table(honest), ""]
    lines += ["## With planted faults", "", *(fault_table(faulty) if faulty else ["none planted"]), ""]
    lines += [f"{time.perf_counter() - began:.0f} s with {args.workers} workers; torch {torch.__version__}.", ""]
    print("\n".join(lines))
    if args.output:
        with atomic_write(args.output) as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
