"""A finished run of train_clm.py, found again from its folder: settings, rows, the model before and after training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dptune._validate import present, refuse
from dptune.adapter_files import attach_adapter
from dptune.published import PUBLISH_NAME, published_model
from dptune.report.statement import PrivacyStatement
from dptune.run.checkpoint import TRAINING_STATE_NAME
from dptune.units.unit import PrivacyUnit, choose_of_authors
from utils.attacks.allowed import Profile, profile_of_run
from utils.cli.flags import parse
from utils.cli.settings_file import SETTINGS_NAME
from utils.data.encode_rows import MakeRecord
from utils.data.load import load_training_data
from utils.data.prompts import PROMPT_STYLE_OF_ROWS
from utils.data.records import RowRecords
from utils.data.sources import FileRows, RowSource, numbered
from utils.data.template_date import date_of_training, told_date
from utils.data.tokenization import TokenizedDataset, tokenize
from utils.files.cells import Place, author_of
from utils.files.folders import recorded_by_training
from utils.files.shards import find_files, paths_in_words
from utils.files.tables import Row
from utils.models.loading import load_model, load_tokenizer
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups
from utils.training.plan import num_sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN = "RUN"
_CHANGED = "the rows are not those of the training"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: the run's folder.
        groups: its flags, with what the user gave instead.
        statement: its guarantee, or why there is none.
        profile: pairs of epsilon and delta that its ledger gives; none without a guarantee.
        tokenizer: the base model's.
    """

    folder: Path
    groups: Groups
    statement: PrivacyStatement
    profile: Profile
    tokenizer: PreTrainedTokenizerBase

    @property
    def unit(self) -> PrivacyUnit:
        """Whose presence the run hides."""
        return self.groups.privacy.unit

    @property
    def day(self) -> str | None:
        """The day that chat templates told in the training."""
        return date_of_training(self.folder)


@dataclass(frozen=True)
class AttackedRows:
    """Training rows and rows that were held out.

    Attributes:
        train, held_out: the tokenised rows, as in training.
        members: training rows that can be scored, ascending.
        others: held-out rows that can be scored and that are no training rows, ascending.
        known: number of held-out rows that were left out, because they are training rows or of a training author.
        authors: the author of each training row and of each held-out row; None if the unit is a row, or if the
            held-out rows name no authors.
    """

    train: TokenizedDataset
    held_out: TokenizedDataset
    members: np.ndarray
    others: np.ndarray
    known: int
    authors: tuple[list[str | None], list[str | None]] | None


def find_run(
    folder: str, *, model: str | None = None, train_file: Sequence[str] = (), held_out_file: Sequence[str] = ()
) -> TrainedRun:
    """The run that a folder holds.

    Args:
        folder: its output folder.
        model: folder or hub name of the base model; None for that of the run.
        train_file, held_out_file: the rows; empty for those that the run's settings name.

    Raises:
        InvalidArgument: the folder holds no finished run of train_clm.py.
    """
    path = Path(folder)
    if not (path / SETTINGS_NAME).is_file() or not (path / PUBLISH_NAME).is_dir():
        told = f"holds no finished run: it needs {SETTINGS_NAME} and the folder {PUBLISH_NAME}"
        refuse(RUN, folder, f"{told}; give the --output_dir of train_clm.py")
    if next(recorded_by_training(path, PROMPT_STYLE_OF_ROWS), None) is None:
        refuse(RUN, folder, "was not trained by train_clm.py, whose models this program reads; give another folder")
    words = ["--config", str(path / SETTINGS_NAME)]
    words += [] if model is None else [f"--model_name_or_path={model}"]
    words += ["--train_file", *train_file] if train_file else []
    words += ["--validation_file", *held_out_file] if held_out_file else []
    groups = Groups(*parse(*CAUSAL_LM_GROUPS, args=words))
    statement, profile = profile_of_run(folder)
    tokenizer = load_tokenizer(groups.model.model_name_or_path, **groups.model.hub)
    return TrainedRun(path, groups, statement, profile, tokenizer)


def find_rows(run: TrainedRun) -> AttackedRows:
    """The run's training rows, and its held-out rows without those that it was trained on.

    Raises:
        InvalidArgument: there are none, or the training rows are others than the run was trained on.
    """
    groups = run.groups
    train, held_out = load_training_data(
        tokenizer=run.tokenizer,
        unit=run.unit,
        seed=groups.optimization.seed,
        day=run.day,
        **vars(groups.data),
    )
    _require_same_rows(run, train)
    if held_out is None:
        told = "the run had no held-out rows to compare with; give rows like the training's that it was not trained on"
        refuse("--held_out_file", None, told)
    authors = _authors(run, train, held_out)
    members, candidates = (np.flatnonzero(one.num_answer_tokens) for one in (train, held_out))
    trained = {_content(train, row) for row in range(len(train))}
    writers = set() if authors is None else {name for name in authors[0] if name is not None}
    new = [
        row
        for row in candidates.tolist()
        if _content(held_out, row) not in trained and (authors is None or authors[1][row] not in writers)
    ]
    others = np.array(new, dtype=np.int64)
    for what, rows in (("training", members), ("held-out", others)):
        if len(rows) < 2:
            data = run.groups.data
            given = data.train_file if what == "training" else data.validation_file
            flag = "--train_file" if what == "training" else "--held_out_file"
            known = f"; {len(candidates) - len(others)} are training rows too" if what == "held-out" else ""
            refuse(
                flag,
                given and paths_in_words(given),
                f"there are {len(rows)} {what} rows with something to learn{known}; give at least 2",
            )
    return AttackedRows(train, held_out, members, others, len(candidates) - len(others), authors)


def encode_rows(run: TrainedRun, rows: Sequence[Row], flag: str, path: str) -> TokenizedDataset:
    """Rows in memory as the run's training would have made them. `flag` and `path` name them in errors.

    Raises:
        InvalidArgument: a row is no training row.
    """
    data = run.groups.data
    with told_date(run.day):
        make: MakeRecord = RowRecords(
            rows[0],
            Place(flag, path, 1),
            prompt_style=data.prompt_style,
            tokenizer=run.tokenizer,
            named=data.named,
        )
        records = [make(row, Place(flag, path, number)) for number, row in enumerate(rows, start=1)]
    return tokenize(records, run.tokenizer, data.block_size)


def models(run: TrainedRun, device: torch.device) -> Iterator[Any]:
    """The model that the training started from, then the trained model; one of them is in memory at a time.

    Raises:
        InvalidArgument: a model cannot be loaded.
    """
    groups, folder = run.groups, str(run.folder)
    arguments = groups.model
    load = partial(load_model, dtype=torch.float32, device=device, attention=arguments.attn_implementation)
    model = load(
        arguments.model_name_or_path, token=arguments.access_token, revision=arguments.revision, bits=arguments.qbits
    )
    if groups.lora.initial_adapter is not None:
        attach_adapter(model, groups.lora.initial_adapter)
    yield model
    if published_model(folder) == folder:
        attach_adapter(model, folder)
        yield model
        return
    model.to("meta")  # frees its weights; the caller still holds the model
    yield load(published_model(folder))


def _require_same_rows(run: TrainedRun, train: TokenizedDataset) -> None:
    """Refuse training rows that are others than those of the training, as far as the run recorded them."""
    count, stated = num_sampled(run.unit, train), run.statement.num_examples
    if count != stated:
        told = f"there are {count:,} {run.statement.sampled}, and the run had {stated:,}"
        refuse("--train_file", None, f"{_CHANGED}: {told}; give the files of the training")
    recorded = recorded_fingerprint(run.folder)
    if recorded is not None and recorded != train.fingerprint():
        refuse("--train_file", None, f"{_CHANGED}: their fingerprint differs; give the files of the training")


def recorded_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the training rows in a run's checkpoints; None if there is none."""
    for state in sorted(folder.glob(f"checkpoint-*/{TRAINING_STATE_NAME}")):
        try:
            found = json.loads(state.read_text(encoding="utf-8"))["identity"]["training_data"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # a checkpoint that is being written, or damaged: the next one tells
        return str(found)
    return None


def was_cut(data: TokenizedDataset, row: int, end: int | None) -> bool:
    """Whether a row was cut to the block size: every whole row ends with the end token."""
    return int(data.ids[data.starts[row + 1] - 1]) != end


def _content(data: TokenizedDataset, row: int) -> int:
    """A hash of a row's tokens."""
    return hash(data.ids[data.starts[row] : data.starts[row + 1]].tobytes())


def _authors(
    run: TrainedRun, train: TokenizedDataset, held_out: TokenizedDataset
) -> tuple[list[str | None], list[str | None]] | None:
    """Who wrote the training rows and the held-out rows; None if that is no matter, or not known."""
    unit, data = run.unit, run.groups.data
    if unit.column is None or not data.validation_file:
        return None
    flag = "--validation_file"
    source = FileRows(find_files(data.validation_file, flag), flag, "validation")
    if not any(unit.column in row for _, row in numbered(source)):
        return None
    names = _names(data.training_rows(unit), unit.column)
    if unit.bounds_authors:
        keep, _ = choose_of_authors(names, unit.examples, run.groups.optimization.seed)
        names = [name for name, kept in zip(names, keep, strict=True) if kept]
    found = names, _names(source, unit.column)
    if [len(one) for one in found] != [len(train), len(held_out)]:
        refuse("--train_file", None, f"{_CHANGED}: they changed while they were read; run the command again")
    return found


def _names(source: RowSource, column: str) -> list[str | None]:
    return [author_of(row, column, place) for place, row in numbered(source)]


def prompt_of(data: TokenizedDataset, row: int) -> tuple[int, ...]:
    """The tokens of a row before the first learned one; at least one."""
    start, stop = data.starts[row], data.starts[row + 1]
    first = int(np.argmax(data.is_answer[start:stop]))
    return tuple(data.ids[start : start + present(first or None, "token before an answer")].tolist())


def times_in(data: TokenizedDataset, other: TokenizedDataset, row: int) -> int:
    """How many rows of `data` have the tokens of a row of `other`."""
    wanted = other.ids[other.starts[row] : other.starts[row + 1]]
    alike = np.flatnonzero(data.lengths == len(wanted))
    return sum(bool(np.array_equal(data.ids[data.starts[i] : data.starts[i + 1]], wanted)) for i in alike)
