"""Reads and tokenises the data of train_clm.py: a user's files, a data set of the hub or a built-in one.

Rows stream from their files through worker processes into arrays on disk, which every rank maps. So no process ever
holds all rows, and they are tokenised once for all ranks of a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import refuse, require_positive
from dptune.sampling import Parts
from dptune.units.unit import PrivacyUnit
from utils.cli.machines import ALONE, Machine
from utils.data.encoding import Encoder
from utils.data.forms import AS_USUAL, NamedColumns
from utils.data.hub import HubRows
from utils.data.make_rows import RowSettings, Sources
from utils.data.named_sets import DATA_DIR, DATASET_NAMES, FIRST_DAY, LAST_DAY
from utils.data.pubmed import DayRange, abstract_files
from utils.data.row_arrays import open_arrays
from utils.data.row_folder import FLAG, HELD_OUT, TRAIN, RowFolder, Splits, clear_leftovers
from utils.data.sources import AbstractRows, FileRows
from utils.data.tokenization import TokenizedDataset
from utils.files.shards import Paths, as_list, find_files, paths_in_words
from utils.files.tables import SPLITS, has_validation_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROW = PrivacyUnit()


def load_training_data(
    *,
    dataset_name: str | None,
    train_file: Paths | None,
    train_file_weights: Sequence[float] | None = None,
    validation_file: Paths | None,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    data_dir: str | Path | None = None,
    date_from: str = FIRST_DAY,
    date_to: str = LAST_DAY,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    text_column: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    messages_column: str | None = None,
    unit: PrivacyUnit = _ROW,
    seed: int = 0,
    users_flag: str | None = None,
    data_cache: str | None = None,
    run_folder: Path | None = None,
    day: str | None = None,
    machine: Machine = ALONE,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The training set and the validation set; None if there is no validation set. Every rank calls it.

    Args:
        dataset_name: one of DATASET_NAMES, or a data set of the hub or a folder in its layout, whose name has a slash;
            exactly one of this and `train_file`.
        train_file: files, globs, folders of files or saved DatasetDicts (see `utils.files.shards.find_files`).
        train_file_weights: one for each value of `train_file`, above 0: how often its rows are drawn, compared with
            those of the others. None draws all alike.
        validation_file: the same for validation. Without it, the validation split of a single DatasetDict or of the
            named data set is used, if it has one.
        prompt_style: see `utils.data.prompts.format_prompt`.
        tokenizer: a fast tokenizer.
        block_size: maximum tokens per example.
        data_dir: holds a folder for each built-in data set (`pubmed`); None for the project's own `data`.
        date_from, date_to: ISO days, inclusive, for built-in data sets with dates.
        dataset_config, dataset_split: of a data set of the hub; by default its default configuration, and "train".
        text_column, prompt_column, answer_column, messages_column: the columns of the one form that rows have, if they
            are called otherwise (see `utils.data.forms`).
        unit: the privacy unit. With a column, the training set records each row's author; if the unit bounds authors,
            at most `unit.examples` rows of each are kept.
        seed: chooses which rows of an author are kept.
        users_flag: see `utils.data.records.RowRecords`; not for the validation set.
        data_cache: a folder that keeps the tokenised rows for the next run.
        run_folder: where they are until all ranks have mapped them, without `data_cache`; None for a temporary folder.
        day: what chat templates take for today; None for the real day.
        machine: the ranks of this machine. One of them makes the rows.

    Raises:
        InvalidArgument: for a mistake in the flags or the data; names the flag, its value and the remedy.
    """
    named = NamedColumns(text_column, prompt_column, answer_column, messages_column)
    settings = RowSettings(prompt_style, tokenizer, block_size, unit, seed, users_flag, day, named)
    find = source_finder(
        dataset_name=dataset_name,
        train_file=train_file,
        data_dir=data_dir,
        date_from=date_from,
        date_to=date_to,
        dataset_config=dataset_config,
        dataset_split=dataset_split,
        named=named,
        unit=unit,
        own_validation=validation_file is None,
    )
    if train_file_weights is not None:
        _require_weights(train_file_weights, train_file, unit)
    found, splits = _made_once(
        settings,
        lambda: _with_validation(find(), validation_file),
        machine,
        data_cache=data_cache,
        run_folder=run_folder,
    )
    train = found[TRAIN]
    if train_file_weights is not None:
        train = replace(train, parts=_weighted_parts(train_file or (), train_file_weights, splits[TRAIN].rows_of_files))
    return train, found.get(HELD_OUT)


def _made_once(
    settings: RowSettings,
    find: Callable[[], Sources],
    machine: Machine,
    *,
    data_cache: str | None,
    run_folder: Path | None,
) -> tuple[dict[str, TokenizedDataset], Splits]:
    """The data sets, which one rank of the machine makes and all of them map, with what is known of their rows.

    Args:
        settings: how rows become examples.
        find: finds the rows.
        machine, data_cache, run_folder: see `load_training_data`.
    """
    folders: list[RowFolder] = []  # in the process that makes the rows

    def make() -> tuple[Path, Splits]:
        encoder, sources = Encoder(settings.tokenizer, settings.block_size), find()
        key = settings.key(sources)
        folders.append(RowFolder(key, cache=data_cache, run_folder=run_folder, number=machine.rank))
        return folders[0].prepare(lambda path: settings.write(sources, encoder, path))

    machine.once(lambda: clear_leftovers(run_folder))
    path, splits = machine.once(make)
    try:
        return {name: open_arrays(path, name, stored, FLAG) for name, stored in splits.items()}, splits
    finally:
        machine.wait()  # until all have mapped the files
        for own in folders:
            own.discard()


def _require_weights(weights: Sequence[float], train_file: Paths | None, unit: PrivacyUnit) -> None:
    """Refuse weights that do not fit the other flags."""
    flag, given = "--train_file_weights", " ".join(f"{weight:g}" for weight in weights)
    values = as_list(train_file)
    if not values:
        refuse(flag, given, "belongs to --train_file; leave it out")
    if len(weights) != len(values):
        refuse(flag, given, f"give one for each value of --train_file, which has {len(values)}")
    for weight in weights:
        require_positive(flag, weight)
    if unit.column is not None:
        told = f"an author of --privacy_unit {unit.column} may have rows in files of several weights"
        refuse(flag, given, f"{told}; leave the weights out")


def _weighted_parts(train_file: Paths, weights: Sequence[float], rows_of_files: Sequence[int]) -> Parts:
    """The rows that each value of --train_file names, with its weight."""
    left, sizes = list(rows_of_files), []
    for value in as_list(train_file):
        count = len(find_files(value, "--train_file"))
        sizes.append(sum(left[:count]))
        del left[:count]
    if left or not all(sizes):
        refuse("--train_file", paths_in_words(train_file), "names other files than a moment ago; run the command again")
    return Parts(tuple(sizes), tuple(weights))


def source_finder(
    *,
    dataset_name: str | None,
    train_file: Paths | None,
    data_dir: str | Path | None = None,
    date_from: str = FIRST_DAY,
    date_to: str = LAST_DAY,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    named: NamedColumns = AS_USUAL,
    unit: PrivacyUnit = _ROW,
    own_validation: bool = False,
) -> Callable[[], Sources]:
    """What finds the rows of the training data; files and the hub are asked when it is called.

    Args:
        own_validation: whether the data's own validation split is found too, if it has one.
        named: the columns that the user named. The others: see `load_training_data`.

    Raises:
        InvalidArgument: the flags contradict each other.
    """
    if (dataset_name is None) == (train_file is None):
        refuse("--train_file", paths_in_words(train_file), "give exactly one of --train_file and --dataset_name")
    for flag, value in (("--dataset_config", dataset_config), ("--dataset_split", dataset_split)):
        if value is not None and not _is_hub_name(dataset_name):
            refuse(flag, value, "belongs to a --dataset_name of the hub; leave it out")
    if dataset_name is None:
        return partial(_file_sources, train_file or (), own_validation=own_validation)
    if _is_hub_name(dataset_name):
        rows = HubRows(dataset_name, dataset_config, dataset_split or "train")
        return partial(_hub_sources, rows, own_validation=own_validation)
    for flag, column in named.given.items():
        refuse(flag, column, f"--dataset_name {dataset_name} has columns of its own; leave it out")
    folder, days = Path(data_dir or DATA_DIR) / "pubmed", DayRange.parse(date_from, date_to)
    return partial(_named_sources, dataset_name, folder, days, unit)


def _with_validation(sources: Sources, validation_file: Paths | None) -> Sources:
    """The sources, with the files that were given for validation."""
    if validation_file is None:
        return sources
    flag = "--validation_file"
    return {TRAIN: sources[TRAIN], HELD_OUT: FileRows(find_files(validation_file, flag), flag, "validation")}


def _is_hub_name(name: str | None) -> bool:
    """Whether a data set's name is one of the hub, or a folder."""
    return name is not None and "/" in name


def _hub_sources(rows: HubRows, *, own_validation: bool) -> Sources:
    """The rows of a data set of the hub, and those of its validation split."""
    sources: Sources = {TRAIN: rows}
    held_out = next((name for name in SPLITS["validation"] if name in rows.splits and name != rows.split), None)
    if own_validation and held_out is not None:
        sources[HELD_OUT] = replace(rows, split=held_out)
    return sources


def _named_sources(name: str, folder: Path, days: DayRange, unit: PrivacyUnit) -> Sources:
    """The rows of a built-in data set."""
    if unit.column is not None:
        refuse("--privacy_unit", unit.column, f"--dataset_name {name} names no authors; give --train_file")
    if name not in DATASET_NAMES:
        refuse("--dataset_name", name, f"give one of {', '.join(DATASET_NAMES)}, org/name of the hub, or --train_file")
    sources: Sources = {TRAIN: AbstractRows(folder, days)}
    if abstract_files(folder, held_out=True):
        sources[HELD_OUT] = AbstractRows(folder, days, held_out=True)
    return sources


def _file_sources(given: Paths, *, own_validation: bool) -> Sources:
    """The rows of --train_file, and of the validation split of a single DatasetDict."""
    flag = "--train_file"
    paths = find_files(given, flag)
    sources: Sources = {TRAIN: FileRows(paths, flag)}
    if own_validation and len(paths) == 1 and has_validation_split(paths[0], flag):
        sources[HELD_OUT] = FileRows(paths, flag, "validation")
    return sources
