"""Games against the real engine: in each step, is a unit in the data or not?

A launch is a `PrivateRun` with everything that a training has: Poisson draws, hooks, clipping, noise under keys of the
operating system, the ledger, and several ranks. Its data set is one unit per output of a `StandIn`. A secret fair coin
per unit and block of steps decides whether the unit is in the data; the rows of one that is not have a gradient of
zero. The adversary knows all other units' coins and draws, and sees what every step releases.

Shapes: S steps, U units, N rows, W ranks, P all trained parameters, flat.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from dptune._validate import refuse, require_count, require_within
from dptune.accounting.delta import default_delta
from dptune.audit.stand_in import LORA, StandIn
from dptune.audit.threads import run_in_threads
from dptune.clipping_styles import FLAT, Clipping
from dptune.flat import released_size
from dptune.lora import trainable_parameters
from dptune.mechanism import PrivacyConfig
from dptune.ranks import Ranks
from dptune.run.plan import RunPlan
from dptune.run.session import PrivateRun
from dptune.units.unit import ItemUnit

_CLIP_NORMS = (1e-9, 1e9)  # so that gradients a thousand times as long, and their squares, are floating-point numbers
FLOAT32 = "float32"
DTYPES = (FLOAT32, "bfloat16")
_AT_ONCE = 32  # rows in a micro-batch
_MEMORY = Path("/dev/shm")  # where the ledger of a launch costs no time; it is lost anyway


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What is audited.

    Attributes:
        noise_multiplier: sigma.
        clip_norm: C.
        clipping: the clipping style.
        trained: "lora" or "whole", see `dptune.audit.stand_in.TRAINED`.
        group_size: rows of one unit that are drawn and clipped each on its own, see `PrivacyConfig`.
        rows_per_unit: rows of one unit that are drawn together and clipped as one.
        ranks: number of ranks that share a step.
        dtype: of forward passes: "float32", or "bfloat16" as under `mixed_precision: bf16`.
        units: number of units in the stand-in's data.
    """

    noise_multiplier: float
    clip_norm: float = 1.0
    clipping: Clipping = FLAT
    trained: str = LORA
    group_size: int = 1
    rows_per_unit: int = 1
    ranks: int = 1
    dtype: str = FLOAT32
    units: int = 32

    def __post_init__(self) -> None:
        for name in ("group_size", "rows_per_unit", "ranks"):
            require_count(name, getattr(self, name))
        require_count("units", self.units, minimum=2)
        if self.dtype not in DTYPES:
            refuse("dtype", self.dtype, f"is not audited; give one of {', '.join(DTYPES)}")
        require_within("clip_norm", self.clip_norm, _CLIP_NORMS)
        self.config(1.0, 1)  # checks the rest

    @property
    def rows(self) -> int:
        """N, how many rows are drawn from."""
        return self.units * self.group_size

    def stand_in(self) -> StandIn:
        """The model."""
        return StandIn(self.units, self.trained, self.clipping, self.clip_norm)

    def config(self, sampling_probability: float, steps: int) -> PrivacyConfig:
        """The engine's configuration for `steps` steps of a launch."""
        return PrivacyConfig(
            num_examples=self.rows,
            expected_batch_size=sampling_probability * self.rows,
            steps=steps,
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            delta=default_delta(self.rows),
            clipping=self.clipping,
            group_size=self.group_size,
        )


@dataclass(frozen=True)
class Launch:
    """What one launch released, and what only the audit knows.

    Attributes:
        released: the released gradients times the divisor, over the clip norm: float32 [S, P].
        shares: what each rank sent of that, with its own noise, float32 [S, W, P]; None for one rank.
        owners: the rank that each row was fed on, int8 [S, N]; -1 if it was not drawn.
        coins: whether the unit was in the data, bool [S, U].
    """

    released: Tensor
    shares: Tensor | None
    owners: np.ndarray
    coins: np.ndarray

    def counts(self, rank: int | None = None) -> np.ndarray:
        """How many rows of each unit were drawn, on all ranks or one, whatever its coin; int64 [S, U]."""
        drawn = self.owners >= 0 if rank is None else self.owners == rank
        counts: np.ndarray = drawn.reshape(*self.coins.shape, -1).sum(2)
        return counts

    def noise(self, contributions: Tensor, rank: int | None = None) -> Tensor:
        """What is left of the release, or of a rank's share, without the units' contributions; float32 [S, P]."""
        seen = self.released if rank is None or self.shares is None else self.shares[:, rank]
        present = torch.from_numpy(self.counts(rank) * self.coins).double()
        return (seen.double() - present @ contributions).float()

    def observed(self, contributions: Tensor) -> np.ndarray:
        """The releases along the units' directions, float64 [S, U]: what the adversary sees of each unit."""
        directions = contributions / contributions.norm(dim=1, keepdim=True)
        found: np.ndarray = (self.released.double() @ directions.T).numpy()
        return found


def play(mechanism: Mechanism, model: StandIn, *, sampling_probability: float, steps: int, block: int) -> Launch:
    """Play one launch.

    Args:
        mechanism: what is audited.
        model: its stand-in, which each rank copies.
        sampling_probability: q.
        steps: S.
        block: the number of steps that share one coin per unit.
    """
    require_count("steps", steps)
    require_count("block", block)
    plan = plan_of(mechanism, sampling_probability, steps)
    heard: list[Tensor] = []
    size, sent = (
        sum(one.numel() for one in trainable_parameters(model)),
        released_size(model, mechanism.config(1.0, steps)),
    )

    def listen(shares: list[Tensor]) -> None:
        if len(shares[0]) == sent and shares[0].is_floating_point():
            heard.append(torch.stack(shares)[:, :size] / mechanism.clip_norm)

    with TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        found = run_in_threads(
            mechanism.ranks,
            lambda ranks: play_rank(mechanism, copy.deepcopy(model), plan, Path(folder), ranks, block),
            listen,
        )
    owners = np.max([one.owners for one in found], axis=0)
    return Launch(found[0].released, torch.stack(heard) if heard else None, owners, found[0].coins)


def plan_of(mechanism: Mechanism, sampling_probability: float, steps: int) -> RunPlan:
    """The plan of a launch."""
    config = mechanism.config(sampling_probability, steps)
    unit = ItemUnit(group_size=mechanism.group_size)
    return RunPlan(config, config.num_examples, config.expected_batch_size, steps, unit)


def play_rank(
    mechanism: Mechanism,
    model: StandIn,
    plan: RunPlan,
    folder: Path,
    ranks: Ranks,
    block: int,
    *,
    dummies: bool = False,
) -> Launch:
    """One rank's part of a launch; every rank must call this.

    Args:
        mechanism: what is audited.
        model: this rank's stand-in; its trained weights may be sharded.
        plan: see `plan_of`.
        folder: for the ledger.
        ranks: the ranks.
        block: see `play`.
        dummies: whether ranks must run equally many passes, as those with sharded weights must.

    Returns:
        What the launch released, and which rows this rank was fed.
    """
    coins = ranks.from_main(lambda: _coins(plan.steps, block, mechanism.units))
    owners = np.full((plan.steps, mechanism.rows), -1, dtype=np.int8)
    releases = []
    parameters = trainable_parameters(model)  # an open run has turned their gradients off
    run = PrivateRun(plan, folder, ranks)
    sampler = run.sampler()
    run.prepare(model)
    with run:
        for number in range(plan.steps):
            if run.clip_norm != mechanism.clip_norm and run.step is not None:
                run.step.load_state_dict({"clip_norm": mechanism.clip_norm})  # adaptive: each game has the same C
            drawn = sampler.draw()
            own = drawn[ranks.rank :: ranks.world_size]
            owners[number, own] = ranks.rank
            run.begin_step()
            passes = _passes(len(drawn), ranks.world_size) if dummies else _passes(len(own), 1)
            for items in np.array_split(own, passes) if passes else []:
                _feed(run, model, mechanism, items, coins[number])
            run.finish_step()
            releases.append(_released(parameters) * (plan.expected_batch_size / mechanism.clip_norm))
    return Launch(torch.stack(releases), None, owners, coins)


def _coins(steps: int, block: int, units: int) -> np.ndarray:
    """Fair coins, bool [S, U], the same for the steps of a block; seeded by the operating system."""
    blocks = -(-steps // block)
    tossed = np.random.default_rng().integers(0, 2, size=(blocks, units), dtype=bool)
    return np.repeat(tossed, block, axis=0)[:steps]


def _passes(rows: int, ranks: int) -> int:
    return -(-rows // (_AT_ONCE * ranks))


def _feed(run: PrivateRun, model: StandIn, mechanism: Mechanism, items: np.ndarray, coins: np.ndarray) -> None:
    """Run the pass of some drawn rows; a row of a unit that is not in the data has no gradient."""
    units = items // mechanism.group_size
    present = coins[units]
    if not len(items):  # a rank without rows takes part with a row that does not count
        units, present = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool)
    rows = torch.from_numpy(np.repeat(units, mechanism.rows_per_unit))
    counts = torch.from_numpy(np.repeat(present, mechanism.rows_per_unit))
    with torch.autocast("cpu", torch.bfloat16, enabled=mechanism.dtype != FLOAT32):
        losses = model(rows)
    run.backward(losses.float() * counts, rows_per_unit=mechanism.rows_per_unit, items=items)


def _released(parameters: list[nn.Parameter]) -> Tensor:
    """The released gradient, flat, float32 [P]; the whole of it if it is sharded."""
    grads = [one.grad for one in parameters if one.grad is not None]
    whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return torch.cat([grad.flatten() for grad in whole]).float()
