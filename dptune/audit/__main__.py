r"""Audit a mechanism or a training: compare what an adversary wins with the stated epsilon.

    python -m dptune.audit mechanism OUT
    python -m dptune.audit mechanism --noise_multiplier 0.8 --sampling_probability 0.01 --delta 1e-5 --output_dir a
    python -m dptune.audit training OUT

The first takes the settings of a finished run, the second those of its flags. Both play games against the real engine
with made-up rows whose gradients are the worst case for privacy. They train nothing and read no data. The third judges
the guesses about canary rows that a training has left in OUT/audit/canaries.json and dials.json.

Each writes audit.json, audit.md and audit.png. The exit status is 0 without a contradiction, 1 with one, and 2 for bad
input. A bound below the stated epsilon is no proof that there is no fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import InvalidArgument, present, refuse, renamed
from dptune.accounting.rounding import rounded_up

if TYPE_CHECKING:
    from dptune.audit.pages import Page
    from dptune.audit.settings import Audited

_FOLDERS = {"mechanism": Path("audit"), "training": Path("audit", "training")}  # in a run's folder
_FLAGS = {
    "composed": "--composed_steps",
    "path": "RUN",
    **{
        name: f"--{name}"
        for name in (
            "noise_multiplier",
            "sampling_probability",
            "delta",
            "clip_norm",
            "trained",
            "group_size",
            "rows_per_unit",
            "ranks",
            "dtype",
            "units",
            "steps",
            "confidence",
        )
    },
}
_DTYPES = ("float32", "bfloat16")  # `games.DTYPES`, which needs torch
_STYLES = ("flat", "per-layer", "automatic", "adaptive")


def run_mechanism(args: argparse.Namespace) -> bool:
    """Audit a mechanism for the flags `args`. Returns whether it is contradicted.

    Raises:
        InvalidArgument: a value outside its range, or a folder that holds no finished run.
    """
    # torch: not while flags are parsed
    from dptune.audit.mechanism import Plan, audit_mechanism, implied_epsilon
    from dptune.audit.pages import Page

    found = _audited(args)
    plan = Plan(
        sampling_probability=found.sampling_probability,
        delta=found.delta,
        steps=args.steps,
        composed=args.composed_steps,
        confidence=args.confidence,
    )
    output = _output(args)
    result = audit_mechanism(found.mechanism, plan)
    implied = None
    if found.steps is not None:
        implied = implied_epsilon(
            result.mu,
            sampling_probability=found.sampling_probability,
            steps=found.steps,
            delta=found.delta,
            group_size=found.mechanism.group_size,
        )
    settings = {
        **{name: str(value) for name, value in vars(found.mechanism).items()},
        "sampling_probability": found.sampling_probability,
        "steps of each launch": plan.steps,
        "steps of a composed game": plan.composed,
        "games": result.games,
        "steps of the run": found.steps,
    }
    page = Page(
        kind="mechanism",
        verdict=result.verdict,
        contradicted=result.contradicted,
        epsilon=implied,
        stated_epsilon=found.epsilon,
        delta=found.delta,
        confidence=plan.confidence,
        findings=result.findings,
        settings=settings,
        private=True,
    )
    if implied is not None and found.epsilon is not None:
        print(f"whole run: an epsilon below {implied:.4g} is ruled out; stated {rounded_up(found.epsilon)}")
    _tell(output, page)
    return result.contradicted


def run_training(args: argparse.Namespace) -> bool:
    """Audit a training for the flags `args`. Returns whether it is contradicted.

    Raises:
        InvalidArgument: the folder holds no run with a guarantee, or no canaries.
    """
    from dptune.audit.mechanism import Result
    from dptune.audit.pages import Page
    from dptune.audit.settings import statement_of_run
    from dptune.audit.training import audit_training, canaries_in
    from dptune.ledger import LEDGER_NAME, Ledger
    from dptune.report.statement import spends_with_unused

    folder, statement = Path(args.run), statement_of_run(args.run)
    canaries = canaries_in(folder)
    delta = present(statement.delta, "delta")
    spends = spends_with_unused(statement, Ledger(folder / LEDGER_NAME), statement.unused_steps)
    findings = audit_training(canaries, spends, delta=delta, confidence=args.confidence)
    count = sum(len(one.included) for one in canaries)
    result = Result(tuple(sorted(findings, key=lambda one: not one.contradicted)), 0.0, count)
    bounds = [one.found for one in findings if one.measured.startswith("epsilon")]
    page = Page(
        kind="training",
        verdict=result.verdict,
        contradicted=result.contradicted,
        epsilon=max(bounds),
        stated_epsilon=statement.epsilon,
        delta=delta,
        confidence=args.confidence,
        findings=result.findings,
        settings={"canaries": count, "steps": statement.steps},
        private=False,
    )
    _tell(_output(args), page)
    return result.contradicted


def _tell(output: Path, page: Page) -> None:
    """Write and print what was found."""
    from dptune.audit.pages import write_page

    write_page(output, page)
    for one in page.findings:
        print(f"{one.question}: {one.measured} {one.found:.4g}, stated {one.stated:.4g}")
    print(f"written to {output}", page.verdict, sep="\n")


def _audited(args: argparse.Namespace) -> Audited:
    """The settings of the run, or of the flags."""
    from dptune.audit.games import Mechanism
    from dptune.audit.settings import Audited, settings_of_run, style_named

    needed = ("noise_multiplier", "sampling_probability", "delta")
    if args.run is not None:
        for name in needed:
            if getattr(args, name) is not None:
                refuse(f"--{name}", getattr(args, name), "the run's own is audited; give RUN or flags, not both")
        return settings_of_run(args.run, ranks=args.ranks, dtype=args.dtype)
    for name in needed:
        if getattr(args, name) is None:
            refuse(f"--{name}", None, "give it, or the folder of a finished run")
    mechanism = Mechanism(
        noise_multiplier=args.noise_multiplier,
        clip_norm=args.clip_norm,
        clipping=style_named(args.clipping, args.noise_multiplier),
        trained=args.trained,
        group_size=args.group_size,
        rows_per_unit=args.rows_per_unit,
        ranks=args.ranks,
        dtype=args.dtype,
    )
    return Audited(mechanism, args.sampling_probability, args.delta, args.run_steps)


def _output(args: argparse.Namespace) -> Path:
    if args.output_dir is None and args.run is None:
        refuse("--output_dir", None, "give a folder for audit.json, audit.md and audit.png")
    return Path(args.output_dir) if args.output_dir is not None else Path(args.run) / _FOLDERS[args.kind]


def audit_parser() -> argparse.ArgumentParser:
    """The parser of the program's flags."""
    program = argparse.ArgumentParser(
        "python -m dptune.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = program.add_subparsers(dest="kind", required=True)
    mechanism = kinds.add_parser("mechanism", help="play games against the real engine", allow_abbrev=False)
    _add_mechanism(mechanism)
    training = kinds.add_parser("training", help="judge the guesses about a training's canaries", allow_abbrev=False)
    training.add_argument("run", metavar="RUN", help="folder of a finished run that was trained with canaries")
    sure = "with which all findings together are right (default 0.95)"
    training.add_argument("--confidence", type=float, default=0.95, help=sure)
    training.add_argument("--output_dir", help="folder for the files of the audit (default RUN/audit/training)")
    return program


def _add_mechanism(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run, whose settings are audited")
    flags.add_argument("--noise_multiplier", type=float, help="sigma, without RUN")
    flags.add_argument("--sampling_probability", type=float, help="q, the probability of a row per step, without RUN")
    flags.add_argument("--delta", type=float, help="probability with which epsilon may fail, without RUN")
    flags.add_argument("--clip_norm", type=float, default=1.0, help="maximum gradient norm, without RUN (default 1)")
    flags.add_argument("--clipping", choices=_STYLES, default="flat", help="clipping style, without RUN (default flat)")
    flags.add_argument(
        "--trained",
        default="lora",
        choices=("lora", "whole"),
        help="adapters, or all weights of all kinds of layers; without RUN (default lora)",
    )
    group = "rows of one unit, each drawn and clipped on its own; without RUN (default 1)"
    flags.add_argument("--group_size", type=int, default=1, help=group)
    together = "rows of one unit that are drawn together and clipped as one; without RUN (default 1)"
    flags.add_argument("--rows_per_unit", type=int, default=1, help=together)
    flags.add_argument("--run_steps", type=int, help="steps of the whole run, for its epsilon; without RUN")
    passes = "of forward passes, bfloat16 as under mixed_precision bf16 (default float32)"
    flags.add_argument("--dtype", choices=_DTYPES, default=_DTYPES[0], help=passes)
    flags.add_argument("--ranks", type=int, default=1, help="ranks that share a step, in this process (default 1)")
    flags.add_argument("--steps", type=int, default=500, help="steps of each of the four launches (default 500)")
    flags.add_argument("--composed_steps", type=int, default=10, help="steps of a game of several steps (default 10)")
    sure = "with which all findings together are right (default 0.9999)"
    flags.add_argument("--confidence", type=float, default=1 - 1e-4, help=sure)
    flags.add_argument("--output_dir", help="folder for the files of the audit (default RUN/audit)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the audit that the command line names."""
    args = audit_parser().parse_args(argv)
    try:
        with renamed(_FLAGS):
            contradicted = run_mechanism(args) if args.kind == "mechanism" else run_training(args)
    except InvalidArgument as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if contradicted:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
