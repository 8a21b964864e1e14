r"""Select synthetic texts so that each kind is as frequent as among private texts, using a noisy histogram.

    python -m scripts.resample_with_dp_histogram --real_file private.jsonl --synthetic_file instructions.jsonl \
        --output_dir resampled --num_buckets 1000 --histogram_sigma 10 --budget_file outputs/my_job/budget.jsonl

Synthetic texts are embedded and clustered. Each private record votes once, for its nearest cluster. The votes get
Gaussian noise of --histogram_sigma, and synthetic texts are drawn to match them (Yu et al. 2024). The release is
entered in the budget file beside the generator's training, and the composed epsilon is printed. Running the same line
again reuses the released votes and spends nothing more; it enters them in the budget file if they are missing there.

Writes `resampled.jsonl` (rows of the synthetic file) and `histogram.json` (the noisy votes), which may be published at
the composed epsilon, and `private_state.json`, which must not be published.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dptune._validate import refuse, require_count, require_delta, require_positive
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.budget import Budget
from dptune.histogram import release
from dptune.keystream import Keystream
from dptune.run.lock import FolderLock
from dptune.units.unit import EXAMPLE, PrivacyUnit, group_by_author
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.data.row_authors import authors_of, refuse_unnoticed_users
from utils.files.cells import Place, require_columns, text_of
from utils.files.jsonl import json_line, write_jsonl
from utils.files.tables import Row, read_rows, show_columns
from utils.synthetic.embeddings import TFIDF, make_embedder
from utils.synthetic.released_votes import ReleasedVotes, save_votes, saved_votes, texts_digest
from utils.synthetic.resampling import CLUSTERERS, MINIBATCH, Buckets, cluster, distance, private_votes, resample

RESAMPLED_NAME, BUDGET_NAME = "resampled.jsonl", "budget.jsonl"
STAGE = "histogram of the private records"
# The engine's name of a setting -> the flag of this program.
FLAGS = {
    "noise_multiplier": "--histogram_sigma",
    "dimensions": "--embedding_dimensions",
    "unit": "--privacy_unit",
    "budget": "--budget_file",
}


@dataclass
class ResamplingArguments:
    """Files, clusters and noise."""

    _argument_group_name = "resampling"

    real_file: str = field(metadata={"help": "private records: JSON, JSONL, CSV, Parquet or a saved DatasetDict"})
    synthetic_file: str = field(metadata={"help": "synthetic texts to choose from, in the same formats"})
    output_dir: str = field(metadata={"help": "folder for resampled.jsonl and histogram.json"})
    text_column: str = field(default="instruction", metadata={"help": "column with the texts, in both files"})
    num_samples: int | None = field(
        default=None, metadata={"help": "maximum number of synthetic texts to keep; default: half of them"}
    )
    num_buckets: int = field(default=1000, metadata={"help": "number of clusters of synthetic texts"})
    histogram_sigma: float = field(
        default=10.0,
        metadata={"help": "standard deviation of the noise on each cluster's votes; a record has one vote"},
    )
    privacy_unit: str = field(
        default=EXAMPLE,
        metadata={"help": "example, or the column of authors, each of whom then has one vote"},
    )
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect rows although the file names users: a user with many rows is protected less"},
    )
    budget_file: str | None = field(
        default=None, metadata={"help": "budget file of the pipeline; default: a new one in --output_dir"}
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "delta of the printed epsilon; default: a tenth of 1 / number of votes, rounded down to a power of "
            "ten"
        },
    )
    embedder: str = field(default=TFIDF, metadata={"help": "embedder: tfidf, or a sentence-transformers model"})
    embedding_dimensions: int = field(default=64, metadata={"help": "dimensions of tfidf embeddings"})
    clusterer: str = field(
        default=MINIBATCH, metadata={"help": "k-means: minibatch is scikit-learn's", "choices": CLUSTERERS}
    )
    seed: int = field(default=0, metadata={"help": "seed of clusters and draws; never of the noise"})

    def __post_init__(self) -> None:
        for flag in ("num_buckets", "embedding_dimensions"):
            require_count(f"--{flag}", getattr(self, flag))
        if self.num_samples is not None:
            require_count("--num_samples", self.num_samples)
        if self.ignore_users and self.privacy_unit != EXAMPLE:
            refuse("--ignore_users", True, "contradicts --privacy_unit; leave one out")
        require_positive("--histogram_sigma", self.histogram_sigma)
        if self.delta is not None:
            require_delta(self.delta, name="--delta")

    @property
    def unit(self) -> PrivacyUnit:
        """The privacy unit: who has a vote."""
        return PrivacyUnit() if self.privacy_unit == EXAMPLE else PrivacyUnit(self.privacy_unit)


@exit_on_invalid_argument(ResamplingArguments, flags=FLAGS)
def main(argv: Sequence[str] | None = None, *, keystream: Keystream | None = None) -> None:
    """Parse the command line, release the votes and resample.

    Args:
        argv: the command line; `sys.argv[1:]` if None.
        keystream: source of the noise, for tests only; by default keyed from the operating system.
    """
    (given,) = parse(ResamplingArguments, args=argv, description=__doc__)
    folder = Path(given.output_dir)
    real, synthetic = (read_rows(path, flag) for path, flag in _files(given))
    units = _units(real, given)
    num_votes = len(real) if units is None else len(set(units))
    delta = default_delta(num_votes) if given.delta is None else given.delta
    require_delta(delta, num_votes, name="--delta")
    synthetic_texts = _texts(synthetic, given, "synthetic_file")
    budget = Budget(given.budget_file or folder / BUDGET_NAME)
    budget_is_new = not budget.path.exists()
    embedder = make_embedder(given.embedder, dimensions=given.embedding_dimensions, seed=given.seed)
    buckets = cluster(synthetic_texts, given.num_buckets, embedder, given.seed, given.clusterer)
    real_texts = _texts(real, given, "real_file")
    identity = _identity(given, synthetic_texts, real_texts, buckets, units)
    _require_writable(folder, synthetic, given.synthetic_file)
    with FolderLock() as lock:  # otherwise two programs could both release votes, and keep only one release
        lock.take(folder)
        released = saved_votes(folder, identity)
        if released is None:
            budget.epsilon(delta)  # refuses a budget without an epsilon before more is spent
            released = _release(private_votes(real_texts, buckets, embedder, units), budget, given, keystream)
            save_votes(folder, released, {"sigma": given.histogram_sigma, "unit": given.unit.name}, identity)
        else:  # the budget file may be another one than at the release
            _enter(budget, given, released.release, secret_noise=released.secret_noise)
        rows = resample(buckets, released.votes, given.num_samples or max(1, len(synthetic) // 2), given.seed)
        write_jsonl(folder / RESAMPLED_NAME, (synthetic[row] for row in rows))
    print(*_describe(given, buckets, released.votes, rows, num_votes), *budget.describe(delta), sep="\n")
    if given.delta is None:
        print(delta_in_words(num_votes, "votes"))
    if budget_is_new:
        print(f"NOTE: {budget.path} is new: neither it nor the total includes the training of the generator")


def _files(given: ResamplingArguments) -> list[tuple[str, str]]:
    return [(given.real_file, "--real_file"), (given.synthetic_file, "--synthetic_file")]


def _texts(rows: Sequence[Row], given: ResamplingArguments, which: str) -> list[str]:
    path = getattr(given, which)
    if given.text_column not in rows[0]:
        remedy = f"no such column in {path}, which has {show_columns(rows[0])}; give one of them"
        refuse("--text_column", given.text_column, remedy)
    texts = []
    for number, row in enumerate(rows, start=1):
        place = Place(f"--{which}", path, number)
        require_columns(row, (given.text_column,), place)
        texts.append(text_of(row, given.text_column, place))
    return texts


def _units(real: Sequence[Row], given: ResamplingArguments) -> list[int] | None:
    """The number of each private record's author; a record without an author is its own unit."""
    column = given.unit.column
    if column is None:
        if not given.ignore_users:
            refuse_unnoticed_users(real, "--real_file", given.real_file, "--privacy_unit")
        return None
    return group_by_author(authors_of(real, column, "--real_file", given.real_file)).of_row.tolist()


def _require_writable(folder: Path, rows: Sequence[Row], path: str) -> None:
    """Make the folder, and check before epsilon is spent that the results can be saved."""
    for number, row in enumerate(rows, start=1):
        try:
            json_line(row)
        except (TypeError, ValueError, RecursionError) as error:
            remedy = f"cannot be written as JSON ({type(error).__name__}); remove columns that are not text"
            Place("--synthetic_file", path, number).refuse(remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        refuse("--output_dir", str(folder), f"cannot be written to ({error.strerror}); give another folder")


def _release(
    votes: np.ndarray, budget: Budget, given: ResamplingArguments, keystream: Keystream | None
) -> ReleasedVotes:
    """The noisy votes; they are entered in the budget before the noise is drawn."""
    name, secret_noise = secrets.token_hex(8), keystream is None or keystream.secret
    _enter(budget, given, name, secret_noise=secret_noise)
    return ReleasedVotes(release(votes, given.histogram_sigma, keystream), name, secret_noise)


def _enter(budget: Budget, given: ResamplingArguments, release_id: str, *, secret_noise: bool) -> None:
    """Enter the release in the budget, once."""
    if secret_noise:
        budget.enter_gaussian(STAGE, given.histogram_sigma, unit=given.unit.name, release=release_id)
    else:
        reason = "the noise came from a fixed key, so anyone can repeat it"
        budget.enter_without_privacy(STAGE, reason, release=release_id)


def _identity(
    given: ResamplingArguments,
    synthetic: Sequence[str],
    real: Sequence[str],
    buckets: Buckets,
    units: Sequence[Hashable] | None,
) -> dict[str, object]:
    """What released votes depend on, JSON values. It has a digest of the private records, so do not publish it."""
    names = ("num_buckets", "histogram_sigma", "privacy_unit", "embedder", "embedding_dimensions", "clusterer", "seed")
    settings = {name: getattr(given, name) for name in names}
    # Another version of a library or model may form other clusters. The assignment is compared, not the centres, whose
    # last bits may differ.
    clusters = texts_digest([str(bucket) for bucket in buckets.of_synthetic])
    whose = {} if units is None else {"units": texts_digest([repr(unit) for unit in units])}
    return (
        settings
        | {"synthetic_file": texts_digest(synthetic), "real_file": texts_digest(real), "clusters": clusters}
        | whose
    )


def _describe(
    given: ResamplingArguments, buckets: Buckets, released: np.ndarray, rows: np.ndarray, num_votes: int
) -> list[str]:
    """The result in printable lines; about private records only released values and the number of units."""
    lines = [
        f"{len(rows)} of {len(buckets.of_synthetic)} synthetic texts in {Path(given.output_dir) / RESAMPLED_NAME}",
        f"distance to the noisy votes      {distance(buckets, released):.3f} before, "
        f"{distance(buckets, released, rows):.3f} after (total variation over {len(buckets)} clusters)",
    ]
    if num_votes / len(buckets) < given.histogram_sigma:
        voters = "records" if given.unit.column is None else "authors"
        lines.append(
            f"NOTE: {num_votes} {voters} give {num_votes / len(buckets):.1f} votes per cluster, less than the noise of "
            f"{given.histogram_sigma:g}: use a smaller --num_buckets"
        )
    return lines


if __name__ == "__main__":
    main()
