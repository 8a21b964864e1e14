"""Checkpoints: everything that a run needs to resume after a crash, in a folder that is either complete or absent.

`<run>/checkpoint-<step>` holds
- the trained weights: `lora_weights.bin`, an adapter that can be loaded as it is, or `trained_weights.bin`, parameters
  of the model itself, or the folder `shards`, which all ranks write, also with the optimizer's tensors;
- the optimizer with its schedule;
- `average.pt`, the average of the weights, if the run keeps one and does not write it into `shards`;
- the step, with the settings that a resumed run must share;
- a copy of the ledger;
- further files of the program that trains;
- a manifest of sizes and SHA-256 sums.

A save fills the folder under a hidden name, syncs it and renames it. The next save clears what a crash leaves behind.
Sampling and noise have no state to save: a resumed run draws both anew, and the ledger counts the steps that run again.
Do not publish a checkpoint: with the fingerprints in its identity, an attacker can confirm a guess of the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dptune._files import atomic_write, sync_folder
from dptune._validate import refuse, require_count
from dptune.adapter_files import WEIGHTS_NAME, torch_bytes
from dptune.ledger import LEDGER_NAME, Ledger
from dptune.run.shards import SHARDS_NAME, Shards

TRAINED_NAME = "trained_weights.bin"
OPTIMIZER_NAME = "optimizer.pt"
AVERAGE_NAME = "average.pt"
TRAINING_STATE_NAME = "state.json"
MANIFEST_NAME = "manifest.json"

_FORMAT = 2  # of the whole folder: raise it when this module can no longer read older checkpoints
_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
_HIDDEN = re.compile(r"\.(checkpoint-\d+)\.[0-9a-f]+\.(tmp|replaced)")
_ALWAYS = {OPTIMIZER_NAME, TRAINING_STATE_NAME}  # plus one of the two files of weights
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The state of a run after some of its steps.

    Attributes:
        step: completed optimizer steps.
        ledger_steps: lines in the ledger at that moment; 0 without privacy.
        identity: settings that a resumed run must share, as plain JSON.
        config: the resolved configuration, as plain JSON without secrets.
        weights: what `adapter_files.adapter_state_dict` returns, or the trained parameters by name.
        optimizer: the optimizer's `state_dict()`.
        schedule: the learning-rate schedule's `state_dict()`.
        mechanism: the private step's `state_dict()`.
        shards: the checkpoint's folder, if ranks wrote the weights, the average and the optimizer's tensors there; then
            `weights` and `average` are empty. Read them with `dptune.run.shards.load_shards`.
        averaged: how many steps the average of the weights holds; 0 for none.
        average: that average by name, see `dptune.iterate_average.IterateAverage`.
    """

    step: int
    ledger_steps: int
    identity: dict[str, Any]
    config: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, object]
    schedule: dict[str, object]
    mechanism: dict[str, float] = field(default_factory=dict)
    shards: Path | None = None
    averaged: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    run_folder: str | os.PathLike[str],
    state: TrainingState,
    ledger: Ledger | None,
    *,
    keep: int | None,
    shards: Shards | None = None,
    more: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `<run_folder>/checkpoint-<step>` and remove the checkpoints beyond `keep`. Only one process may call it.

    A checkpoint of the same step is replaced, because a resumed run reaches that step with other weights. Checkpoints
    of later steps are removed first, since the resumed run no longer contains them, then the oldest.

    Args:
        run_folder: must exist.
        state: what to save.
        ledger: the ledger of a private run, which is copied; None without privacy.
        keep: number of checkpoints that stay, at least 1; the new one always stays. None keeps all.
        shards: what all ranks write, instead of weights in `state`. The other ranks call `shards.help()` meanwhile.
        more: further files of the program that trains, {name: content}.

    Returns:
        The checkpoint's folder.

    Raises:
        InvalidArgument: the disk is full or fails; the other checkpoints are unchanged.
    """
    if keep is not None:
        require_count("keep", keep)
    if state.ledger_steps != (recorded := ledger.steps if ledger else 0):
        raise RuntimeError(f"the state counts {state.ledger_steps} steps in the ledger, which has {recorded}")
    run_folder = Path(run_folder)
    folder = run_folder / f"checkpoint-{state.step}"
    copy = ledger.content() if ledger else None
    try:
        _clear_leftovers(run_folder)
        contents = chain(_contents(state, copy, weights=shards is None), (more or {}).items())
        _write(folder, contents, shards)
    except OSError as error:
        _refuse_unwritten(folder, error)
    finally:
        if shards is not None:
            shards.give_up()
    _clear_leftovers(run_folder)
    _keep_newest(run_folder, state.step, keep)
    return folder


def load_checkpoint(folder: str | os.PathLike[str]) -> TrainingState:
    """Check every file of a checkpoint against the manifest, then read it; tensors are loaded to the CPU.

    Raises:
        InvalidArgument: a file is missing or damaged; the message names it and the newest older intact checkpoint.
    """
    folder = Path(folder)
    if damage := _damage(folder):
        _refuse_damaged(folder, damage)
    try:
        state = _read(folder)
    except Exception as error:  # a file that `save_checkpoint` did not write can fail in any way
        _refuse_damaged(folder, f"it cannot be read ({type(error).__name__})")
    if folder.resolve().name != f"checkpoint-{state.step}":
        refuse("resume_from", str(folder), f"holds step {state.step}; rename it to checkpoint-{state.step}")
    return state


def find_checkpoint(run_folder: str | os.PathLike[str], resume_from: str) -> Path | None:
    """The checkpoint that `resume_from` names; `load_checkpoint` checks its content. Only one process may call it.

    Args:
        run_folder: the run's folder.
        resume_from: "latest" for the checkpoint of the highest step, or the path of one directly inside `run_folder`.

    Returns:
        The checkpoint's folder; None if `resume_from` is "latest" and there is no checkpoint.

    Raises:
        InvalidArgument: the path is not a checkpoint of this run.
    """
    run_folder = Path(run_folder)
    _restore_replaced(run_folder)
    found = _checkpoints(run_folder)
    if resume_from == "latest":
        return found[max(found)] if found else None
    chosen = next((path for path in found.values() if path.resolve() == Path(resume_from).resolve()), None)
    if chosen is None:
        if not found:
            refuse("resume_from", resume_from, f"{run_folder} holds no checkpoint yet; give latest, or leave it out")
        choice = ", ".join(str(path) for path in found.values())
        refuse("resume_from", resume_from, f"is not a checkpoint of this run; give latest, or one of {choice}")
    return chosen


def _contents(state: TrainingState, ledger: bytes | None, *, weights: bool) -> Iterator[tuple[str, bytes | memoryview]]:
    """(name, content) of every file except the shards and the manifest, one at a time."""
    if weights:
        is_adapter = all(".lora." in name for name in state.weights)
        yield WEIGHTS_NAME if is_adapter else TRAINED_NAME, torch_bytes(state.weights)
    yield OPTIMIZER_NAME, torch_bytes({"optimizer": state.optimizer, "schedule": state.schedule})
    if state.average:
        yield AVERAGE_NAME, torch_bytes(state.average)
    names = ("step", "ledger_steps", "identity", "config", "mechanism", "averaged")
    plain = {name: getattr(state, name) for name in names}
    yield TRAINING_STATE_NAME, _json_bytes(plain)
    if ledger is not None:
        yield LEDGER_NAME, ledger


def _write(folder: Path, contents: Iterable[tuple[str, bytes | memoryview]], shards: Shards | None) -> None:
    """Make `folder` with these files, the shards and their manifest, whole or not at all."""
    temporary = _hidden(folder, "tmp")
    temporary.mkdir()
    try:
        files = {} if shards is None else shards.write(temporary)
        for name, content in contents:
            files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _write_file(temporary / name, content)
        _write_file(temporary / MANIFEST_NAME, _json_bytes({"format": _FORMAT, "files": files}))
        _put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the next save clears what is left
        _restore_replaced(folder.parent)
        raise


def _write_file(path: Path, content: bytes | memoryview) -> None:
    """Write and sync a file and its name."""
    with atomic_write(path, "wb") as file:
        file.write(content)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename the finished folder to `folder`. An old `folder` is moved aside first; `_restore_replaced` finds it."""
    if folder.exists():
        os.rename(folder, _hidden(folder, "replaced"))
    os.rename(temporary, folder)
    sync_folder(folder.parent)


def _restore_replaced(run_folder: Path) -> None:
    """Put back a checkpoint that was moved aside, if a crash kept its replacement from arriving."""
    for path, place, kind in _leftovers(run_folder):
        if kind == "replaced" and not place.exists():
            os.rename(path, place)


def _clear_leftovers(run_folder: Path) -> None:
    """Remove the hidden folders that saves left behind, crashed or just finished."""
    _restore_replaced(run_folder)
    for path, place, _ in _leftovers(run_folder):
        _discard(path, place)


def _keep_newest(run_folder: Path, newest: int, keep: int | None) -> None:
    """Remove checkpoints beyond `keep`: those of later steps first, the last one first, then the oldest.

    `newest` is never removed.
    """
    found = _checkpoints(run_folder)
    later, earlier = [step for step in found if step > newest], [step for step in found if step < newest]
    surplus = 0 if keep is None else max(0, len(found) - keep)
    for step in [*reversed(later), *earlier][:surplus]:
        _discard(found[step], found[step])


def _discard(path: Path, place: Path) -> None:
    """Remove the checkpoint at `place`, or what is left of it at `path`.

    It is renamed first, so that half a checkpoint never looks like a checkpoint. A failure (for example a file in use
    on a network disk) only warns, because it must not end the run; the next save tries again.
    """
    hidden = _hidden(place, "tmp")
    try:
        os.rename(path, hidden)
        sync_folder(hidden.parent)
        shutil.rmtree(hidden)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed ({error.strerror or error}); remove it by hand", stacklevel=2)


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}")


def _leftovers(run_folder: Path) -> list[tuple[Path, Path, str]]:
    """(path, path of the checkpoint that it belongs to, kind) of every folder with a hidden name."""
    matches = ((path, _HIDDEN.fullmatch(path.name)) for path in _entries(run_folder))
    return [(path, run_folder / match[1], match[2]) for path, match in matches if match]


def _checkpoints(run_folder: Path) -> dict[int, Path]:
    """{step: folder} of every folder with a checkpoint's name, sorted by step."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in _entries(run_folder))
    return dict(sorted((int(match[1]), path) for path, match in matches if match and path.is_dir()))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _read(folder: Path) -> TrainingState:
    saved = _loaded(folder / OPTIMIZER_NAME)
    plain = json.loads((folder / TRAINING_STATE_NAME).read_bytes())
    state = {"optimizer": saved["optimizer"], "schedule": saved["schedule"], **plain}
    if (folder / SHARDS_NAME).exists():
        return TrainingState(**state, weights={}, shards=folder)
    name = WEIGHTS_NAME if (folder / WEIGHTS_NAME).exists() else TRAINED_NAME
    average = _loaded(folder / AVERAGE_NAME) if (folder / AVERAGE_NAME).exists() else {}
    return TrainingState(**state, weights=_loaded(folder / name), average=average)


def _loaded(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint, or None if it is intact."""
    try:
        files = _listed(json.loads((folder / MANIFEST_NAME).read_bytes()))
        return next((damage for name, entry in files.items() if (damage := _file_damage(folder / name, **entry))), None)
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} is damaged or of another version"


def _listed(manifest: Any) -> dict[str, Any]:
    """The files of a manifest; raises an error if this module cannot read such a checkpoint."""
    if manifest["format"] != _FORMAT or not _is_complete(manifest["files"].keys()):
        raise ValueError
    files: dict[str, Any] = manifest["files"]
    return files


def _is_complete(names: Iterable[str]) -> bool:
    found = {name.partition("/")[0] for name in names}
    if any(name != Path(name).name and not name.startswith(f"{SHARDS_NAME}/") for name in names):
        return False  # a file elsewhere
    return found >= _ALWAYS and len(found & {WEIGHTS_NAME, TRAINED_NAME, SHARDS_NAME}) == 1


def _file_damage(path: Path, *, size: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} is damaged ({path.stat().st_size} bytes instead of {size})"
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    return None if same else f"{path.name} is damaged (its SHA-256 differs from the manifest's)"


def _refuse_unwritten(folder: Path, error: OSError) -> NoReturn:
    first = "free space" if error.errno in _FULL else "fix that"
    then = "resume from the latest" if _checkpoints(folder.parent) else "start again: there is no other checkpoint"
    reason = f"{folder.name} could not be written ({error.strerror or error})"
    refuse("run_folder", str(folder.parent), f"{reason}; {first}, then {then}")


def _refuse_damaged(folder: Path, damage: str) -> NoReturn:
    match = _NAME.fullmatch(folder.resolve().name)
    siblings = _checkpoints(folder.resolve().parent)
    older = [path for step, path in siblings.items() if match and step < int(match[1])]
    intact = next((path for path in reversed(older) if _damage(path) is None), None)
    remedy = f"give {intact}, the newest older intact one" if intact else "there is no older intact checkpoint"
    refuse("resume_from", str(folder), f"{damage}; {remedy}")


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
