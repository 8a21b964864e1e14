"""What the attacks found as printed lines, as JSON values, and as sections of a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dptune._files import atomic_write
from dptune.accounting.rounding import rounded_up
from utils.attacks.copied import LONG, Copied
from utils.attacks.exposure import CHANCE_BITS
from utils.attacks.membership import FALSE_ALARMS, REFERENCE, SHOWN, Attack, Caught
from utils.attacks.plots import plot_exposures, plot_roc, plot_scores
from utils.attacks.results import ROWS, Findings, Membership, percent
from utils.files.jsonl import write_json
from utils.synthetic.page import Plot, Section, render

JSON_NAME, PAGE_NAME = "attack.json", "attack.html"
ATTACK_NOTICE = "Not private: made from training rows. No epsilon covers it; do not publish it."
TITLE = "What an attacker can get from this model"
_QUANTILES = {"median": 0.5, "95% quantile": 0.95, "longest": 1.0}


def write_attack(folder: Path, findings: Findings, settings: Mapping[str, object]) -> None:
    """Write the JSON file and the page to a folder that exists, each whole or not at all."""
    sections = [_membership_section(findings, one) for one in findings.membership]
    sections += [_secrets_section(findings)] if findings.secrets else []
    sections += [] if findings.copied is None else [_copied_section(findings.copied)]
    page = render(TITLE, ATTACK_NOTICE, [_privacy(findings), *findings.verdict()], sections, settings)
    content = {"not_private": ATTACK_NOTICE, "settings": settings, **as_json(findings)}
    write_json(folder / JSON_NAME, content)
    with atomic_write(folder / PAGE_NAME) as file:
        file.write(page)


def as_json(findings: Findings) -> dict[str, Any]:
    """All numbers, as JSON values by name."""
    return {
        "epsilon": findings.epsilon,
        "delta": findings.delta,
        "unit": findings.unit,
        "held_out_rows_left_out": findings.known,
        "allowed": [{"false_alarms": rate, "caught": findings.allowed(rate)} for rate in FALSE_ALARMS],
        "membership": {
            one.of: {
                "members": one.sizes[0],
                "others": one.sizes[1],
                "rows_differ": one.rows_differ,
                "attacks": {name: asdict(found) for name, found in one.attacks.items()},
            }
            for one in findings.membership
        },
        "secrets": [
            {"rows": one.times, "bits": one.trained.bits, **asdict(one.trained), "bits_before": one.start.bits}
            for one in findings.secrets
        ],
        "copied": None if findings.copied is None else _copied_as_json(findings.copied),
        "contradictions": findings.contradictions(),
        "verdict": findings.verdict(),
    }


def _copied_as_json(copied: Copied) -> dict[str, Any]:
    return {
        "texts": len(copied.train),
        "rows_of_each_kind": copied.rows,
        "longest_train": int(copied.train.max()),
        "longest_held_out": int(copied.held_out.max()),
        "longer": copied.longer,
        "shorter": copied.shorter,
        "long": copied.long,
        "chance": copied.chance,
    }


def printed(findings: Findings) -> list[str]:
    """A short table and the verdict, as lines."""
    lines = [f"privacy                {_privacy(findings)}"]
    for one in findings.membership:
        members, others = one.sizes
        known = findings.known if one.of == ROWS else 0
        left_out = f"; {known:,} more left out, which were trained on" if known else ""
        lines += [f"{one.of:<23}{members:,} of the training, {others:,} held out{left_out}", ""]
        lines += _as_table(["", *_columns()], [[label, *cells] for label, cells in _membership_rows(findings, one)])
        lines.append("")
    for number, secret in enumerate(findings.secrets, start=1):
        rank = f"rank {secret.trained.rank} of {secret.trained.candidates}"
        bits = f"{secret.trained.bits:.1f} bits, {secret.start.bits:.1f} before training"
        lines.append(f"secret {number:<16}in {secret.times} training rows: {rank}, {bits}")
    if findings.copied is not None:
        copied = findings.copied
        shared = f"{copied.train.max()} words with a training row, {copied.held_out.max()} with a held-out row"
        lines.append(f"longest passage        {shared}, in {len(copied.train)} texts")
    first, *further = findings.verdict()
    return [*lines, f"verdict                {first}", *(f"{'':<23}{line}" for line in further)]


def _privacy(findings: Findings) -> str:
    if findings.epsilon is None or findings.delta is None:
        return "none: the run states no epsilon"
    return f"epsilon {rounded_up(findings.epsilon)} at delta {findings.delta:g}, for {findings.unit}"


def _columns() -> list[str]:
    return ["AUC", *(f"caught at {percent(rate)} false alarms" for rate in FALSE_ALARMS)]


def _membership_rows(findings: Findings, one: Membership) -> list[tuple[str, list[str]]]:
    """The rows of the table: each attack, guessing, and what epsilon allows."""
    rows = [(name, _cells(found)) for name, found in one.attacks.items()]
    rows.append(("guessing", ["0.500", *(percent(rate) for rate in FALSE_ALARMS)]))
    limits = [findings.allowed(rate) for rate in FALSE_ALARMS]
    rows.append(("most that epsilon allows", ["", *("no limit" if one is None else percent(one) for one in limits)]))
    return rows


def _cells(found: Attack) -> list[str]:
    shares = [_share(one, rate) for one, rate in zip(found.caught, FALSE_ALARMS, strict=True)]
    return [f"{found.auc:.3f} ± {found.auc_error:.3f}", *shares]


def _share(caught: Caught | None, rate: float) -> str:
    if caught is None:
        return f"needs {round(1 / rate):,} held out"
    return f"{percent(caught.share)} ({percent(caught.low)} to {percent(caught.high)})"


def _membership_section(findings: Findings, one: Membership) -> Section:
    members, others = one.sizes
    explanation = (
        f"{members:,} training {one.of} and {others:,} held-out {one.of} are scored. A threshold flags the stated "
        f"share of held-out {one.of}; the table says how many training {one.of} it catches, with a "
        f"{percent(SHOWN)} interval. Epsilon limits what any attack may catch. The start model has not seen the rows: "
        f"if it tells them apart, the held-out {one.of} are of another kind. {findings.known:,} held-out rows were "
        "left out, since they are training rows too or of a training author."
    )
    if one.of == ROWS and "author" in findings.unit:
        explanation += (
            " The run protects authors: its epsilon is for all rows of an author, so it limits single rows too."
        )
    real_members, real_others = ({name: scores[name] for name in one.real} for scores in (one.members, one.others))
    plots = [
        Plot(
            plot_roc(real_members, real_others, findings.profile),
            f"Share of training {one.of} caught, by false alarms. A curve well above the line of epsilon contradicts "
            "it. At the left end few rows decide, so chance may lift a curve there.",
        ),
        Plot(
            plot_scores(one.members[REFERENCE], one.others[REFERENCE], f"score: {REFERENCE}, nats per token"),
            "How much training lowered the loss. Without memorising, both curves are alike.",
        ),
    ]
    return Section(f"Who was trained on: {one.of}", explanation, _columns(), _membership_rows(findings, one), plots)


def _secrets_section(findings: Findings) -> Section:
    secrets = findings.secrets
    rows = [
        (
            f"secret {number}",
            [
                f"{one.times:,}",
                f"{one.trained.rank:,} of {one.trained.candidates:,}",
                f"{one.trained.bits:.1f}",
                f"{one.start.bits:.1f}",
            ],
        )
        for number, one in enumerate(secrets, start=1)
    ]
    explanation = (
        "The trained model's loss ranks each secret among random candidates of the same form. Exposure is "
        "log2(candidates) - log2(rank). A secret that the model knows nothing of has "
        f"{CHANCE_BITS:.1f} bits on average. Epsilon protects one unit: a secret in several rows is protected less."
    )
    most = max(math.log2(one.trained.candidates) for one in secrets)
    image = plot_exposures([one.trained.bits for one in secrets], [one.start.bits for one in secrets], most)
    columns = ["training rows", "rank", "exposure (bits)", "before training"]
    return Section("Planted secrets", explanation, columns, rows, [Plot(image, "Exposure of each secret.")])


def _copied_section(copied: Copied) -> Section:
    rows = [
        (label, [f"{np.quantile(lengths, at):.0f}" for lengths in (copied.train, copied.held_out)])
        for label, at in _QUANTILES.items()
    ]
    explanation = (
        f"{len(copied.train)} texts of the model are searched for in {copied.rows:,} training rows and in as many "
        "held-out rows, for the longest passage that each shares with any of them. It is longer with the training "
        f"rows for {copied.longer} texts, and with the held-out rows for {copied.shorter}. The chance of so many is "
        f"{copied.chance:.2g} for a model that does not copy. {copied.long} texts share {LONG} words or more with a "
        "training row, and more than any text with a held-out row."
    )
    columns = ["words shared with a training row", "words shared with a held-out row"]
    return Section("Copied passages", explanation, columns, rows)


def _as_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of equal width; the first is aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[head[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(head[1:], widths[1:], strict=True))]]
    lines += [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return ["  ".join(line).rstrip() for line in lines]
