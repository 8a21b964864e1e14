"""Whether a folder may be published as it is: its epsilon follows from its ledger, and nothing else lies in it."""

from __future__ import annotations

import json
import math
import re
from fnmatch import fnmatchcase
from pathlib import Path

from dptune._validate import refuse
from dptune._words import counted
from dptune.accounting import account
from dptune.ledger import LEDGER_NAME, Ledger
from dptune.published import CANARIES_SETTING, PUBLISH_NAME, SETTINGS_NAME
from dptune.report.card import STARTED_FROM, privacy_table, published_name
from dptune.report.checksums import CHECKSUMS_NAME, require_checksums
from dptune.report.publish import CARD_NAME, EPSILON_PLOT
from dptune.report.statement import REPORT_NAME, PrivacyStatement, read_privacy_report, spends_with_unused

_WEIGHTS = (
    "lora_weights.bin",
    "adapter_model.safetensors",
    "model.safetensors",
    "model-[0-9]*-of-[0-9]*.safetensors",
)
# What a trained model or adapter consists of: weights, configurations and a tokenizer.
MODEL_FILES = (
    *_WEIGHTS,
    "adapter_config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_ABOUT = (
    CARD_NAME,
    REPORT_NAME,
    EPSILON_PLOT,
    LEDGER_NAME,
    SETTINGS_NAME,
    CHECKSUMS_NAME,
    "LICENSE",
    "LICENSE.*",
    "NOTICE",
)
# Where libraries record the name or path of a model: (file, key).
_NAMES = (
    ("adapter_config.json", "base_model_name_or_path"),
    ("config.json", "_name_or_path"),
    ("tokenizer_config.json", "name_or_path"),
)
_SAME = 1e-6  # relative difference of two computations of one epsilon, by other versions of the accountant


def is_model_file(name: str) -> bool:
    """Whether a file of this name, relative to the folder, belongs to a trained model or adapter."""
    return any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def check_publishable(folder: Path, *, paths: bool = True) -> PrivacyStatement:
    """Check a folder that a run made for publishing, and return its privacy statement.

    With a guarantee, epsilon is computed again from the ledger in the folder. Without one the statement says so, and
    the caller decides.

    Args:
        folder: the folder.
        paths: whether to call `require_no_paths`; False if the caller does.

    Raises:
        InvalidArgument: a file is missing, unknown or a link; the report contradicts itself or the ledger; the card
            states a smaller epsilon; or a file names a path on this machine.
    """
    if runs := sorted(one.parents[1].name for one in folder.glob(f"*/{PUBLISH_NAME}/{REPORT_NAME}")):
        refuse("folder", str(folder), f"holds the runs of {', '.join(runs)}; give the folder of one of them")
    files = _files(folder)
    _require_no_canaries(folder)
    statement = read_privacy_report(folder / REPORT_NAME)
    if not any(fnmatchcase(name, pattern) for name in files for pattern in _WEIGHTS):
        refuse("folder", str(folder), "holds no trained weights; give the folder of a finished run")
    if CARD_NAME not in files:
        refuse("folder", str(folder), f"holds no {CARD_NAME}, which must state the guarantee; restore it")
    if statement.epsilon is not None and statement.delta is not None:
        _require_epsilon(folder, statement, statement.epsilon, statement.delta)
    if paths:
        require_no_paths(folder)
    listed = require_checksums(folder)
    for name in files:
        if name not in listed and any(fnmatchcase(name, pattern) for pattern in _WEIGHTS):
            refuse("file", name, f"is not one of the run's files ({CHECKSUMS_NAME}); move it out of {folder}")
    return statement


def _files(folder: Path) -> list[str]:
    """The names of all files, relative to the folder; refuses one that is not known to be publishable."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            refuse("file", name, "is a link, so another file may be published; put the file there, or move it away")
        if path.is_file():
            if not (is_model_file(name) or any(fnmatchcase(name, pattern) for pattern in _ABOUT)):
                refuse("file", name, f"is not known to be publishable; move it out of {folder}")
            found.append(name)
    return found


def _require_no_canaries(folder: Path) -> None:
    """Refuse a model that learned random text, so that its training could be audited."""
    path = folder / SETTINGS_NAME
    if path.is_file() and (count := _read_object(path).get(CANARIES_SETTING)):
        remedy = f"was trained with {count} canaries, for an audit; train again without them, and publish that"
        refuse("folder", str(folder), remedy)


def _read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file of the folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        refuse("file", path.name, "is not a JSON object; save the model again")
    return found


def _require_epsilon(folder: Path, statement: PrivacyStatement, epsilon: float, delta: float) -> None:
    """Refuse a report or a card whose epsilon is not that of the ledger's steps."""
    path = folder / LEDGER_NAME
    if not path.is_file():
        refuse("ledger", str(path), "is missing, so epsilon cannot be checked; copy it from the run's folder")
    ledger = Ledger(path)
    if ledger.reasons:
        refuse("ledger", str(path), f"has no guarantee ({ledger.reasons[0]}), but {REPORT_NAME} states one")
    if ledger.steps != statement.steps:
        refuse("ledger", str(path), f"has {counted(ledger.steps, 'step')}, but {REPORT_NAME} counts {statement.steps}")
    if {spend.group_size for spend in ledger.spends} != {statement.group_size}:
        refuse("ledger", str(path), f"is of another group size than {REPORT_NAME} states, {statement.group_size}")
    if {spend.cut for spend in ledger.spends} - {statement.cut}:
        refuse("ledger", str(path), f"has draws that are not cut as {REPORT_NAME} states, {statement.cut}")
    if ledger.noise_bands - {statement.noise_bands}:
        refuse("ledger", str(path), f"is of other noise bands than {REPORT_NAME} states, {statement.noise_bands}")
    for name in ("noise_multiplier", "sampling_probability"):
        spent_by, ran = getattr(statement.spend(1), name), {getattr(spend, name) for spend in ledger.spends}
        if ran and spent_by not in ran:
            stated = getattr(statement, name)
            refuse("ledger", str(path), f"has no step with the {name} {stated!r} that {REPORT_NAME} states")
    spent = account(spends_with_unused(statement, ledger, statement.unused_steps), delta=delta).epsilon
    if not math.isclose(spent, epsilon, rel_tol=_SAME):
        refuse("epsilon", epsilon, f"{REPORT_NAME} states it, but the ledger's steps give {spent!r} at delta {delta!r}")
    card = (folder / CARD_NAME).read_text(encoding="utf-8")
    own = card.partition(f"## {STARTED_FROM}")[0]  # below it stand the bounds of other releases
    stated = [float(number) for number in re.findall(r"ε = (\d+(?:\.\d+)?)", own)]
    if not stated or min(stated) < epsilon:
        told = f"states epsilon {min(stated):g}" if stated else "states no epsilon"
        refuse("file", CARD_NAME, f"{told}, but {REPORT_NAME} states {epsilon!r}; restore the card")
    lines = card.splitlines()
    for line in privacy_table(statement):
        if line not in lines:
            refuse("file", CARD_NAME, f"lacks the line {line!r}, which follows from {REPORT_NAME}; restore it")


def require_no_paths(folder: Path) -> None:
    """Refuse files of the model that name a path on this machine instead of a model on the hub.

    Raises:
        InvalidArgument: one does.
    """
    for file, key in _NAMES:
        if not (folder / file).is_file():
            continue
        value = _read_object(folder / file).get(key)
        if isinstance(value, str) and value and published_name(value) != value:
            remedy = f"{key} is a path on this machine; resume the finished run with base_model_name=NAME"
            refuse("file", file, f"{remedy}, or put the base model's name on the hub there")
