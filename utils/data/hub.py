"""Rows of a data set on the Hugging Face hub, or of a local folder in the hub's layout, read as a stream.

No copy of the rows is left in a cache. Their library's messages may quote a row, so they are not shown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dptune._validate import InvalidArgument, refuse
from utils.data.sources import Part, file_states
from utils.files.jsonl import without_nan
from utils.files.tables import Row

_SHOWN = 10  # names of configurations in a message


@dataclass(frozen=True)
class HubRows:
    """The rows of one split.

    Attributes:
        name: the data set's name on the hub, or a folder.
        config: the name of its configuration; None for the default.
        split: the name of the split.
        flag: the flag that named it.
    """

    name: str
    config: str | None = None
    split: str = "train"
    flag: str = "--dataset_name"
    may_be_empty: bool = False

    @property
    def splits(self) -> list[str]:
        """The splits that the data set has.

        Raises:
            InvalidArgument: there is no such data set or configuration, or it cannot be reached.
        """
        return list(self._builder.config.data_files or ())

    def parts(self) -> Iterator[Part]:
        """The split as one part.

        Raises:
            InvalidArgument: there is no such split.
        """
        if self.split not in self.splits:
            refuse(
                "--dataset_split", self.split, f"{self.name} has the splits {', '.join(self.splits)}; give one of them"
            )
        yield self.name, self._rows

    def state(self) -> object:
        """The files of all splits: on the hub with their commit, in a folder with size and time of change."""
        files = {split: list(map(str, paths)) for split, paths in (self._builder.config.data_files or {}).items()}
        local = [Path(path) for paths in files.values() for path in paths if Path(path).exists()]
        return [self.name, self.config, self.split, files, file_states(local)]

    def _rows(self) -> Iterator[Row]:
        with _refusing(self):
            for row in self._builder.as_streaming_dataset(split=self.split):
                yield {name: without_nan(value) for name, value in row.items()}

    @cached_property
    def _builder(self) -> Any:
        import datasets

        with _refusing(self):
            names = datasets.get_dataset_config_names(self.name)
            default = datasets.get_dataset_default_config_name(self.name)
            if (self.config or default or names[0]) not in names or (self.config is None and default is None):
                refuse(
                    "--dataset_config", self.config, f"{self.name} has {', '.join(names[:_SHOWN])}; give one of them"
                )
            with tempfile.TemporaryDirectory() as cache:  # else it would leave a lock in the home directory
                return datasets.load_dataset_builder(self.name, self.config, cache_dir=cache)


@contextmanager
def _refusing(rows: HubRows) -> Iterator[None]:
    """Refuse a data set that the library fails on, without its messages."""
    import datasets

    told = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except (InvalidArgument, GeneratorExit, MemoryError):
        raise
    except Exception as error:  # whatever the library, its file systems and its formats raise
        remedy = (
            "check the name and the network, and set HF_TOKEN for a gated one; a folder must be in the hub's layout"
        )
        refuse(rows.flag, rows.name, f"cannot be read ({type(error).__name__}); {remedy}")
    finally:
        datasets.logging.set_verbosity(told)
