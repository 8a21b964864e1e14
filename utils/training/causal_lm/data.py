"""The rows of a run of train_clm.py: read once for all ranks, looked at before the weights, with those of an audit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dptune._validate import refuse
from dptune.audit.training import Canaries
from dptune.clipping import layers_of
from dptune.run.lock import LOCK_NAME
from utils.cli.launch import ranks_of, sharding_of_launch
from utils.cli.machines import Machine
from utils.data.load import load_training_data
from utils.data.records import roles_of
from utils.data.sources import FileRows, numbered
from utils.data.template_date import TEMPLATE_DATE, tells_date, today
from utils.data.tokenization import TokenizedDataset
from utils.files.folders import missing_folders, remove_empty
from utils.files.shards import find_files, paths_in_words
from utils.models.embeddings import require_embeddings
from utils.training.arguments import Groups
from utils.training.canaries import canaries_of_run, with_canaries
from utils.training.data_arguments import DataArguments
from utils.training.dials import dials_of_run, require_worst_case, with_dials
from utils.training.plan import describe_data
from utils.training.run import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class JobRows:
    """The rows of a run; see `CausalLMJob`."""

    train: TokenizedDataset
    held_out: TokenizedDataset | None
    canaries: Canaries | None
    dials: Canaries | None


def load_rows(
    groups: Groups,
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    *,
    day: str | None,
    machine: Machine,
) -> JobRows:
    """Read the rows, and add those of an audit. Every rank calls it.

    Args:
        groups: the flags.
        folder: the run's, locked meanwhile.
        tokenizer: the model's.
        names: names of all parameters that will be trained.
        day: see `runs_date`.
        machine: the ranks of this machine, of which one makes the rows.

    Raises:
        InvalidArgument: a mistake in the flags or the data, or an audit that does not suit them.
    """
    with held_meanwhile(folder):
        train, held_out = load_training_data(
            tokenizer=tokenizer,
            unit=groups.privacy.unit,
            seed=groups.optimization.seed,
            users_flag=groups.privacy.users_flag,
            run_folder=None if folder.output.dry_run else folder.path,
            day=day,
            machine=machine,
            **vars(groups.data),
        )
    canaries = dials = None
    if count := groups.privacy.audit_canaries:
        canaries = canaries_of(count, tokenizer, folder, groups.data.block_size)
        train = with_canaries(train, canaries)
    if count := groups.privacy.audit_dials:
        require_worst_case(count, groups.clipping.style(layers_of(names).values()))
        dials = dials_of(count, folder)
        train = with_dials(train, dials)
    return JobRows(train, held_out, canaries, dials)


def canaries_of(count: int, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, block_size: int) -> Canaries:
    """The canaries of a run, the same on every rank.

    Raises:
        InvalidArgument: weights are sharded, or see `canaries_of_run`.
    """
    _require_whole("--audit_canaries", count)
    special, resumed = set(tokenizer.all_special_ids), folder.saved is not None
    words = [token for token in range(len(tokenizer)) if token not in special]
    return ranks_of(folder.accelerator).from_main(
        lambda: canaries_of_run(count, folder.path, words, block_size, resumed=resumed)
    )


def dials_of(count: int, folder: RunFolder) -> Canaries:
    """The coins of a run's dials, the same on every rank.

    Raises:
        InvalidArgument: weights are sharded, or see `dials_of_run`.
    """
    _require_whole("--audit_dials", count)
    resumed = folder.saved is not None
    return ranks_of(folder.accelerator).from_main(lambda: dials_of_run(count, folder.path, resumed=resumed))


def _require_whole(flag: str, count: int) -> None:
    if sharding_of_launch() is not None:
        refuse(flag, count, "are scored on one process, which holds no whole model if it is sharded")


def runs_date(tokenizer: PreTrainedTokenizerBase, folder: RunFolder) -> str | None:
    """The day that the chat template tells: that on which the run began. None if it tells none. Every rank calls it."""
    if not tells_date(tokenizer):
        return None
    began = None if folder.saved is None else folder.saved.identity.get(TEMPLATE_DATE)
    return began or ranks_of(folder.accelerator).from_main(today)


def look_at(
    train: TokenizedDataset,
    held_out: TokenizedDataset | None,
    groups: Groups,
    skeleton: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, list[str]]:
    """(the fingerprint of the training data, printed lines about the data). Reads every token.

    Raises:
        InvalidArgument: the model lacks a token of the data, or there is nothing to learn or to measure.
    """
    name, rows = groups.model.model_name_or_path, {"training example": train, "held-out example": held_out}
    size = len(skeleton.get_input_embeddings().weight)
    used = {what: (one.ids_until(size), one.starts) for what, one in rows.items() if one is not None}
    require_embeddings(skeleton, tokenizer, name, used)
    require_something_to_learn(train, groups.data)
    require_answers(held_out, groups.data)
    return train.fingerprint(), describe_data(train, held_out)


@contextmanager
def held_meanwhile(folder: RunFolder) -> Iterator[None]:
    """Lock a run's folder, which holds rows in the block. One that is new is gone afterwards: nothing was written."""
    if folder.output.dry_run:
        yield
        return
    ranks = ranks_of(folder.accelerator)
    missing = missing_folders(folder.path)
    ranks.from_main(lambda: folder.lock.make(folder.path))
    try:
        yield
    finally:
        if ranks.is_main and missing:
            folder.lock.release()
            (folder.path / LOCK_NAME).unlink()
            remove_empty(missing)


def require_something_to_learn(train: TokenizedDataset, data: DataArguments) -> None:
    """Refuse training data without any answer token: the whole budget would buy a model of noise alone."""
    if train.num_without_answer == len(train):
        flag, roles = "--dataset_name", ""
        if data.train_file:
            flag = "--train_file"
            roles = roles_of(row for _, row in numbered(FileRows(find_files(data.train_file, flag), flag)))
        told = f"no training example has an answer token within --block_size {data.block_size}{roles}"
        source = paths_in_words(data.train_file or data.dataset_name)
        refuse(flag, source, f"{told}; raise --block_size, or give examples with answers")


def require_answers(held_out: TokenizedDataset | None, data: DataArguments) -> None:
    """Refuse held-out data without any answer token: there would be no loss to measure."""
    if held_out is not None and held_out.num_without_answer == len(held_out):
        source = paths_in_words(data.validation_file or data.train_file or data.dataset_name)
        remedy = f"no held-out example has an answer token within --block_size {data.block_size}"
        refuse("--validation_file", source, f"{remedy}; raise --block_size, or give examples with answers")
