"""What a resumed run does about a flag that was changed: refuse it, or let it take effect and record from which step.

Each program has a table that gives every flag one of these classes. A test fails for a flag without one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for types only: modules of flags import this one without loading torch
    from dptune.run.checkpoint import TrainingState

CHANGES = "changes"  # the key of the history in `run_config.json`
FROM_STEP = "from_step"  # the first step that ran with a change


class OnResume(Enum):
    """What happens if a flag's value is not that of the run so far."""

    REFUSED = "another value is refused"
    COMPARED = "another value is refused if the data, the model or the mechanism that follows from it is another"
    EFFECTIVE = "another value takes effect, and is recorded with the first step that ran with it"
    RUNTIME = "another value cannot change the result"


OnResumeTable = Mapping[str, OnResume]  # flag -> its class


def resumed_config(config: Mapping[str, Any], saved: TrainingState | None, table: OnResumeTable) -> dict[str, Any]:
    """The settings to record: those of `config`, and the history of what has changed since the run began.

    What takes effect keeps the value that the run began with; `changes` lists the later values, from the oldest.

    Args:
        config: the settings of this launch, JSON values by flag.
        saved: the checkpoint to resume; None for a new run.
        table: the class of each flag. Other keys of `config` are recorded as they are now.

    Raises:
        InvalidArgument: a setting differs that must not.
    """
    if saved is None:
        return dict(config)
    from dptune.run.identity import refuse_other_run  # it imports torch, for which flags must not wait

    before, now = _as_in_effect(saved.config), json.loads(json.dumps(config))
    both = [name for name in now if name in before and name in table]  # a flag may be newer than the checkpoint
    fixed = [name for name in both if table[name] is OnResume.REFUSED]
    refuse_other_run(*({name: _in_words(config[name]) for name in fixed} for config in (before, now)))
    lasting = [name for name in both if table[name] is OnResume.EFFECTIVE]
    changed = {name: now[name] for name in lasting if now[name] != before[name]}
    history = list(saved.config.get(CHANGES, []))
    if changed:
        history.append({FROM_STEP: saved.step + 1, **changed})
    found = dict(config) | {name: saved.config[name] for name in lasting}
    return found | ({CHANGES: history} if history else {})


def describe_changes(config: Mapping[str, Any], saved: TrainingState | None) -> list[str]:
    """Printable lines: what takes effect in this launch."""
    if saved is None:
        return []
    before, history = _as_in_effect(saved.config), config.get(CHANGES, [])
    return [
        f"changed                {name} from {before[name]} to {value}, from step {entry[FROM_STEP]}"
        for entry in history[len(saved.config.get(CHANGES, [])) :]
        for name, value in entry.items()
        if name != FROM_STEP
    ]


def without_unused(config: Mapping[str, Any], last: int) -> dict[str, Any]:
    """`config` without changes from a step that the run does not reach."""
    history = [entry for entry in config.get(CHANGES, []) if entry[FROM_STEP] <= last]
    kept = {name: value for name, value in config.items() if name != CHANGES}
    return kept | ({CHANGES: history} if history else {})


def _in_words(value: Any) -> Any:
    """A list as it stands in a command line, for messages."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _as_in_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings after all changes."""
    found = dict(config)
    for entry in config.get(CHANGES, []):
        found |= {name: value for name, value in entry.items() if name != FROM_STEP}
    return found
