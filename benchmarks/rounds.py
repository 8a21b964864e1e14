"""One setting of a comparison: pairs of contenders, rounds, memory and tables.

The first contender is compared with each of the others, two in a process at a time. More than two in one process slow
each other through the memory that they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks import peers, tables
from benchmarks.arguments import CommonArguments
from benchmarks.contenders import Contender, Job
from benchmarks.lengths import Draw, tokens
from benchmarks.measure import Memory, alternate, in_fresh_process
from benchmarks.settings import Setting, draws_of, job_of, make, measure_memory, set_threads


@dataclass(frozen=True)
class Pair:
    """Two contenders that took turns.

    Attributes:
        seconds: of each contender's rounds; of one alone if the other was left out.
        tokens: of each round.
        left_out: contenders that did not take part -> the reason.
    """

    seconds: dict[str, list[float]]
    tokens: list[int]
    left_out: dict[str, str]

    @property
    def ratios(self) -> list[float]:
        """Seconds of the first over those of the second, round by round."""
        first, second = self.seconds.values()
        return tables.ratios(first, second)

    @property
    def is_whole(self) -> bool:
        """Whether both took part."""
        return len(self.seconds) == 2


@dataclass(frozen=True)
class Result:
    """The measurements of one setting.

    Attributes:
        subject: the contender that is compared with the others.
        pairs: {another contender: the subject beside it}.
        memory: of each contender; empty if not measured.
        left_out: contenders that did not take part -> the reason.
    """

    subject: str
    pairs: dict[str, Pair]
    memory: dict[str, Memory]
    left_out: dict[str, str]

    def markdown(self, description: str) -> str:
        """The description and the tables."""
        parts = [description, tables.pairs(self.subject, [(pair.seconds, pair.tokens) for pair in self.pairs.values()])]
        if self.memory:
            parts.append(tables.memory(self.subject, self.memory))
        return "\n\n".join([*parts, *(f"Left out: {name}: {why}." for name, why in self.left_out.items())])


def compare(args: CommonArguments, setting: Setting, chosen: Sequence[str]) -> Result:
    """Time the first of the chosen contenders (keys of `args.names`) beside each other one.

    Measures the memory of each too, if asked for.
    """
    subject, *others = (args.names[key] for key in chosen)
    pairs = {name: in_fresh_process(time_pair, args, setting, [subject, name]) for name in others or [subject]}
    left_out = {name: why for pair in pairs.values() for name, why in pair.left_out.items()}
    pairs = {name: pair for name, pair in pairs.items() if {subject, name} == set(pair.seconds)}
    memory = {}
    if args.memory:
        names = [name for name in (subject, *others) if name not in left_out]
        memory = {name: in_fresh_process(measure_memory, args, setting, name) for name in names}
    return Result(subject, pairs, memory, left_out)


def time_pair(args: CommonArguments, setting: Setting, names: Sequence[str]) -> Pair:
    """The rounds of two contenders; for a process of its own."""
    set_threads(args)
    job = job_of(args, setting)
    draws = draws_of(setting, job, args.warmup + args.rounds)
    contenders, left_out = gather_contenders(dict.fromkeys(names), job, draws[0][: setting.batch])
    if left_out:
        draws = draws[: args.warmup + 1]  # the other's time alone tells nothing
    try:
        seconds = alternate(
            contenders,
            draws,
            warmup=args.warmup,
            warm_examples=setting.batch,
            device=job.device,
            max_seconds=args.max_seconds,
        )
    finally:
        for contender in contenders:
            contender.close()
    rounds = len(next(iter(seconds.values())))
    return Pair(seconds, [tokens(draw) for draw in draws[args.warmup :][:rounds]], left_out)


def gather_contenders(names: Iterable[str], job: Job, trial: Draw) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that passed a trial step, and why others are left out. A failure of dptune's own step is raised."""
    found: list[Contender] = []
    left_out: dict[str, str] = {}
    for name in names:
        if lacking := peers.missing(name):
            left_out[name] = f"not installed: {', '.join(lacking)}"
            continue
        try:
            contender = make(name, job)
            contender.step(trial)
        except Exception as error:  # a peer may fail in any way; the others are measured all the same
            if name not in peers.NEEDS:
                raise
            reason = next(iter(str(error).splitlines()), "")
            left_out[name] = f"failed with {type(error).__name__}: {reason[:200]}"
            continue
        found.append(contender)
    return found, left_out
