"""All attacks on one run: rows -> losses before and after training -> findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dptune._validate import refuse
from utils.attacks.arguments import AttackArguments
from utils.attacks.copied import Copied, compare_copies
from utils.attacks.exposure import FLAG as SECRETS_FLAG
from utils.attacks.exposure import Secret, exposure, read_secrets, require_uncut
from utils.attacks.membership import mean_of_authors, membership_scores
from utils.attacks.results import AUTHORS, ROWS, Findings, FoundSecret, Membership
from utils.attacks.token_losses import token_losses
from utils.attacks.trained_run import AttackedRows, TrainedRun, encode_rows, models, prompt_of, times_in, was_cut
from utils.data.tokenization import TokenizedDataset
from utils.files.cells import Place, require_columns, text_of
from utils.files.tables import read_rows
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import decode
from utils.generation.batches import TextJob
from utils.generation.hf import GenerateBackend

NEW_TOKENS = 128  # the most that a text has beyond the longest prompt
_SAMPLES_FLAG = "--samples"


@dataclass(frozen=True)
class Planted:
    """Planted secrets, with the tokens of every row that is compared.

    Attributes:
        secrets: S secrets.
        data: the rows: first those with each secret, then those with the candidates of each.
        rows: of each secret, the numbers of its row and of its candidates' rows.
    """

    secrets: Sequence[Secret]
    data: TokenizedDataset
    rows: Sequence[np.ndarray]


@dataclass(frozen=True)
class DrawnRows:
    """Numbers of the training rows and of the held-out rows that are scored, ascending."""

    members: np.ndarray
    others: np.ndarray


def perform(run: TrainedRun, rows: AttackedRows, arguments: AttackArguments, device: torch.device) -> Findings:
    """Attack a run.

    Args:
        run: the run.
        rows: its training rows, and rows that it was not trained on.
        arguments: which attacks.
        device: where the models compute.

    Raises:
        InvalidArgument: a file of secrets or samples is refused, or a model cannot be loaded.
    """
    generator = np.random.default_rng(arguments.seed)
    drawn = DrawnRows(*(_draw(one, arguments.max_rows, generator) for one in (rows.members, rows.others)))
    planted = None if arguments.secrets is None else plant(run, arguments)
    texts = None if arguments.samples is None else read_samples(arguments.samples)
    losses = []
    for model in models(run, device):
        losses.append(_losses(model, run, rows, drawn, planted))
    if texts is None and arguments.num_samples:
        texts = sample(model, run, rows, drawn, arguments)
    start, trained = losses
    return Findings(
        epsilon=run.statement.epsilon,
        delta=run.statement.delta,
        profile=run.profile,
        unit=run.statement.privacy_unit,
        membership=memberships(rows, drawn, start, trained, arguments.min_k),
        known=rows.known,
        secrets=[] if planted is None else _secrets(planted, rows, start["secrets"], trained["secrets"]),
        copied=None if texts is None else copies(texts, run, rows, generator),
    )


Losses = Mapping[str, list[np.ndarray]]  # of "members", "others" and "secrets": token losses of each row


def _losses(model: Any, run: TrainedRun, rows: AttackedRows, drawn: DrawnRows, planted: Planted | None) -> Losses:
    """The token losses of all rows under one model."""
    wanted = {"members": (rows.train, drawn.members), "others": (rows.held_out, drawn.others)}
    if planted is not None:
        wanted["secrets"] = (planted.data, np.arange(len(planted.data)))
    pad = int(run.tokenizer.pad_token_id)
    return {name: token_losses(model, data, of, pad_token_id=pad, what=name) for name, (data, of) in wanted.items()}


def memberships(rows: AttackedRows, drawn: DrawnRows, start: Losses, trained: Losses, min_k: float) -> list[Membership]:
    """The attacks on rows, and on authors where they are known."""
    members, others = (membership_scores(trained[name], start[name], min_k) for name in ("members", "others"))
    found = [Membership(ROWS, members, others)]
    if rows.authors is not None:
        names = [
            [of[row] for row in which] for of, which in zip(rows.authors, (drawn.members, drawn.others), strict=True)
        ]
        means = [mean_of_authors(values, of) for values, of in zip((members, others), names, strict=True)]
        if all(len(next(iter(one.values()))) > 1 for one in means):
            found.append(Membership(AUTHORS, *means))
    return found


def plant(run: TrainedRun, arguments: AttackArguments) -> Planted:
    """The secrets of --secrets, and the tokens of their rows and of their candidates' rows."""
    path = str(arguments.secrets)
    secrets = read_secrets(path, arguments.candidates, arguments.seed)
    filled = [one.filled() for one in secrets]
    first = [rows[0] for rows in filled]
    others = [row for rows in filled for row in rows[1:]]
    data = encode_rows(run, [*first, *others], SECRETS_FLAG, path)
    require_uncut(path, [was_cut(data, row, run.tokenizer.eos_token_id) for row in range(len(first))])
    ends = len(first) + np.cumsum([0, *(len(rows) - 1 for rows in filled)])
    rows = [np.array([number, *range(ends[number], ends[number + 1])]) for number in range(len(first))]
    return Planted(secrets, data, rows)


def _secrets(
    planted: Planted, rows: AttackedRows, start: Sequence[np.ndarray], trained: Sequence[np.ndarray]
) -> list[FoundSecret]:
    before, after = (np.array([float(one.sum()) for one in losses]) for losses in (start, trained))
    return [
        FoundSecret(times_in(rows.train, planted.data, number), exposure(after[of]), exposure(before[of]))
        for number, of in enumerate(planted.rows)
    ]


def read_samples(path: str) -> list[str]:
    """The texts in a file that sampling wrote."""
    texts = []
    for number, row in enumerate(read_rows(path, _SAMPLES_FLAG), start=1):
        place = Place(_SAMPLES_FLAG, path, number)
        require_columns(row, ("text",), place)
        texts.append(text_of(row, "text", place))
    return texts


def sample(model: Any, run: TrainedRun, rows: AttackedRows, drawn: DrawnRows, arguments: AttackArguments) -> list[str]:
    """Texts of the trained model, after prompts of training rows and of held-out rows in turn.

    So neither kind of row is nearer by its prompt.
    """
    kinds = ((rows.train, drawn.members), (rows.held_out, drawn.others))
    jobs = []
    for index in range(arguments.num_samples):
        data, of = kinds[index % 2]
        jobs.append(TextJob(index, "", prompt_of(data, of[index // 2 % len(of)])))
    longest = min(run.groups.data.block_size, max(len(job.ids) for job in jobs) + NEW_TOKENS)
    sampling = SamplingArguments(output_dir="", max_length=longest, seed=arguments.seed)
    backend = GenerateBackend(model, run.tokenizer, sampling)
    texts = {job.index: drawn.text for done in backend.draw(jobs, ()) for job, drawn in done}
    return [texts[job.index] for job in jobs]


def copies(texts: Sequence[str], run: TrainedRun, rows: AttackedRows, generator: np.random.Generator) -> Copied:
    """Search the texts in equally many training rows and held-out rows, as many as there are."""
    if not texts:
        refuse(_SAMPLES_FLAG, None, "holds no text; give a file that sampling wrote")
    count = min(len(rows.members), len(rows.others))
    found = []
    for data, known in ((rows.train, rows.members), (rows.held_out, rows.others)):
        chosen = _draw(known, count, generator)
        found.append([decode(run.tokenizer, data.ids[data.starts[i] : data.starts[i + 1]].tolist()) for i in chosen])
    return compare_copies(texts, *found)


def _draw(rows: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """At most so many of the rows, at random, ascending."""
    return np.sort(generator.permutation(rows)[:most])
