"""Noisy votes on disk: released once, used as often as one likes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dptune._files import atomic_write
from dptune._validate import refuse

HISTOGRAM_NAME, VOTES_STATE_NAME = "histogram.json", "private_state.json"
_NOTICE = "holds a fingerprint of private records: do not publish"


@dataclass(frozen=True)
class ReleasedVotes:
    """One release.

    Attributes:
        votes: with noise, float64 [K].
        release: its id, by which a budget knows it (`dptune.budget.Stage`).
        secret_noise: whether nobody can repeat the noise.
    """

    votes: np.ndarray
    release: str
    secret_noise: bool


def texts_digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def saved_votes(folder: Path, identity: Mapping[str, object]) -> ReleasedVotes | None:
    """The votes that an earlier call released; None where none came so far.

    Raises:
        InvalidArgument: they follow from something else than `identity`, or the files cannot be read.
    """
    if not (folder / HISTOGRAM_NAME).exists():
        return None
    try:
        found = json.loads((folder / HISTOGRAM_NAME).read_text(encoding="utf-8"))
        votes = np.array(found["noisy_votes"], dtype=np.float64)
        released = ReleasedVotes(votes, str(found["release"]), found["secret_noise"] is True)
        saved = json.loads((folder / VOTES_STATE_NAME).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        refuse("--output_dir", str(folder), f"{HISTOGRAM_NAME} or {VOTES_STATE_NAME} is damaged; give a new folder")
    if differing := sorted(name for name in {**saved, **identity} if saved.get(name) != identity.get(name)):
        remedy = (
            f"its votes follow from other {', '.join(differing)}; give a new folder, where votes cost epsilon again"
        )
        refuse("--output_dir", str(folder), remedy)
    return released


def save_votes(
    folder: Path, released: ReleasedVotes, public: Mapping[str, object], identity: Mapping[str, object]
) -> None:
    """Write released votes with `public` facts about them, and, not for publishing, what they follow from.

    The latter first: there are votes only together with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**public, "release": released.release, "secret_noise": released.secret_noise}
    contents = {
        VOTES_STATE_NAME: {"notice": _NOTICE, "identity": dict(identity)},
        HISTOGRAM_NAME: {**facts, "noisy_votes": released.votes.tolist()},
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
