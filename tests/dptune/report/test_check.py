"""A folder to publish passes as a run left it, and every change that would mislead is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dptune import InvalidArgument
from dptune.accounting import Spend, compose
from dptune.ledger import Ledger
from dptune.mechanism import PrivacyConfig
from dptune.noise import GaussianNoise
from dptune.report.card import LORA_ADAPTER
from dptune.report.check import check_publishable, is_model_file
from dptune.report.publish import publish
from dptune.report.statement import state_privacy
from tests.dptune.report.test_prior import EARLIER
from tests.dptune.report.test_statement import not_private

pytestmark = pytest.mark.usefixtures("no_plots")

CONFIG = PrivacyConfig(
    num_examples=100, expected_batch_size=10, steps=3, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5
)
SPEND = {"noise_multiplier": 1.0, "sampling_probability": 0.1, "clip_norm": 1.0}


def save(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("weights")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "ann/base"}))
    (folder / "tokenizer_config.json").write_text("{}")


def private_run(run: Path) -> Path:
    """What a private run of three steps publishes."""
    ledger = Ledger(run / "ledger.jsonl")
    for _ in range(3):
        ledger.record(**SPEND)
    statement = state_privacy(CONFIG, ledger, GaussianNoise(1), privacy_unit="one row")
    return publish(run, statement, save, ledger=ledger, base_model="ann/base", artifact=LORA_ADAPTER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return private_run(tmp_path)


def test_a_folder_passes_as_a_run_left_it(folder: Path) -> None:
    statement = check_publishable(folder)
    assert statement.epsilon == Ledger(folder / "ledger.jsonl").epsilon(1e-5)
    assert (statement.steps, statement.reasons) == (3, ())


def test_steps_that_did_not_run_and_earlier_releases_pass(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for _ in range(2):
        ledger.record(**SPEND)
    made = state_privacy(CONFIG, ledger, GaussianNoise(1), privacy_unit="one row", unused_steps=1)
    started = replace(made, starts_from=(replace(EARLIER, epsilon=0.5),))
    folder = publish(tmp_path, started, save, ledger=ledger, base_model="ann/base", artifact=LORA_ADAPTER)
    assert check_publishable(folder).epsilon == private_epsilon(3)
    edited("privacy_report.json", unused_steps=0)(folder)
    with pytest.raises(InvalidArgument, match="the ledger's steps give"):
        check_publishable(folder)


def test_a_run_of_cut_draws_passes_and_says_so(tmp_path: Path) -> None:
    config, ledger = replace(CONFIG, max_batch=14), Ledger(tmp_path / "ledger.jsonl")
    for _ in range(3):
        ledger.record(**SPEND, sampler="Poisson, cut", cut=config.cut)
    made = state_privacy(config, ledger, GaussianNoise(1), privacy_unit="one row")
    folder = publish(tmp_path, made, save, ledger=ledger, base_model="ann/base", artifact=LORA_ADAPTER)
    found = check_publishable(folder)
    assert found.epsilon == config.planned_epsilon() > 1.1 * private_epsilon(3)
    assert "| Sampler | Poisson, cut at 14 examples |" in (folder / "README.md").read_text()
    edited("privacy_report.json", max_batch=15)(folder)
    with pytest.raises(InvalidArgument, match="draws that are not cut as"):
        check_publishable(folder)


def test_a_run_with_noise_bands_passes_and_says_so(tmp_path: Path) -> None:
    config, ledger = replace(CONFIG, noise_bands=2, steps=3), Ledger(tmp_path / "ledger.jsonl")
    block = ledger.begin_block()
    for _ in range(3):
        ledger.record(**SPEND, sampler="Poisson, cyclic", noise_bands=2, block=block)
    made = state_privacy(config, ledger, GaussianNoise(1), privacy_unit="one row", unused_steps=1)
    folder = publish(tmp_path, made, save, ledger=ledger, base_model="ann/base", artifact=LORA_ADAPTER)
    assert check_publishable(folder).epsilon == config.planned_epsilon() == compose([Spend(1.0, 0.2, 2)], delta=1e-5)
    assert "| Sampler | Poisson, cyclic: 2 groups of examples take turns |" in (folder / "README.md").read_text()
    edited("privacy_report.json", noise_bands=3)(folder)
    with pytest.raises(InvalidArgument, match="is of other noise bands than"):
        check_publishable(folder)
    with pytest.raises(InvalidArgument, match="has steps of 2 noise bands, but the configuration says 1"):
        state_privacy(CONFIG, ledger, GaussianNoise(1), privacy_unit="one row")


def private_epsilon(steps: int) -> float:
    return compose([Spend(1.0, 0.1, steps, 1)], delta=1e-5)


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def extra_step(**changes: object) -> Callable[[Path], None]:
    return lambda folder: Ledger(folder / "ledger.jsonl").record(**SPEND | changes)


def group_of_two(folder: Path) -> None:
    lines = [json.loads(line) | {"group_size": 2} for line in (folder / "ledger.jsonl").read_text().splitlines()]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def cut_at(most: int) -> Callable[[Path], None]:
    """The ledger says that draws were cut, in the first line only."""

    def edit(folder: Path) -> None:
        first, *others = (folder / "ledger.jsonl").read_text().splitlines()
        line = json.loads(first) | {"sampler": "Poisson, cut", "max_batch": most, "num_examples": 100}
        (folder / "ledger.jsonl").write_text("\n".join([json.dumps(line), *others, ""]))

    return edit


def smaller_in_the_card(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("**ε = ", "**ε = 0.0"))


def in_card(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = (folder / "README.md").read_text()
        assert old in card
        (folder / "README.md").write_text(card.replace(old, new))

    return edit


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "diagnostics": (put("diagnostics.jsonl", "{}"), "file='diagnostics.jsonl': is not known to be publishable"),
    "a pickle": (put("training_args.bin", ""), "training_args.bin"),
    "a hidden file": (put(".notes", ""), r"'\.notes'"),
    "a link": (lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"), "'LICENSE': is a link"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no trained weights"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "holds no README.md"),
    "no report": (lambda folder: (folder / "privacy_report.json").unlink(), "report=.*cannot be read"),
    "half a report": (put("privacy_report.json", "{}"), "report=.*is no privacy report"),
    "no ledger": (lambda folder: (folder / "ledger.jsonl").unlink(), "ledger=.*is missing"),
    "one more step": (extra_step(), "has 4 steps, but privacy_report.json counts 3"),
    "a fixed key": (extra_step(noise_key="fixed"), "ledger=.*has no guarantee"),
    "another group size": (group_of_two, "of another group size than privacy_report.json states, 1"),
    "draws that were cut": (cut_at(14), "draws that are not cut as privacy_report.json states, None"),
    "cut draws in the report": (
        edited("privacy_report.json", max_batch=14),
        r"states, Cut\(max_batch=14, num_examples=100\)",
    ),
    "a smaller epsilon": (
        edited("privacy_report.json", epsilon=0.5),
        "epsilon=0.5: privacy_report.json states it, but",
    ),
    "a larger delta": (edited("privacy_report.json", delta=1e-3), "the ledger's steps give"),
    "a contradiction": (edited("privacy_report.json", reasons=["x"]), "a guarantee with reasons against it"),
    "a smaller epsilon in the card": (smaller_in_the_card, "'README.md': states epsilon 0.0"),
    "a card of another kind": (put("README.md", "# A model"), "'README.md': states no epsilon"),
    "a path": (
        edited("adapter_config.json", base_model_name_or_path="/home/ann/base"),
        "'adapter_config.json': base_model_name_or_path is a path on this machine; resume the finished run",
    ),
    "other weights": (put("adapter_model.safetensors", "others"), "'adapter_model.safetensors': is not the file that"),
    "another tokenizer": (put("tokenizer_config.json", "{ }"), "'tokenizer_config.json': is not the file that the run"),
    "more weights": (put("lora_weights.bin", "more"), "'lora_weights.bin': is not one of the run's files"),
    "a missing file": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        "is listed in SHA256SUMS but missing",
    ),
    "no checksums": (lambda folder: (folder / "SHA256SUMS").unlink(), "file=.*is missing"),
    "other checksums": (put("SHA256SUMS", "no sum"), "file=.*has a line that is no checksum"),
    "another noise": (edited("privacy_report.json", noise_multiplier=2.0), "no step with the noise_multiplier 2.0"),
    "another probability": (
        edited("privacy_report.json", sampling_probability=0.05, expected_batch_size=5.0),
        "no step with the sampling_probability 0.05",
    ),
    "fewer people in the card": (in_card("| Steps | 3 |", "| Steps | 2 |"), "lacks the line '| Steps | 3 |'"),
    "another unit in the card": (
        in_card("| one row |", "| one person |"),
        "lacks the line '| Privacy unit | one row |'",
    ),
    "a broken configuration": (put("tokenizer_config.json", "["), "'tokenizer_config.json': is not a JSON object"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_would_mislead_is_refused(change: str, folder: Path) -> None:
    make, message = CHANGES[change]
    make(folder)
    with pytest.raises(InvalidArgument, match=message) as error:
        check_publishable(folder)
    assert "\n" not in str(error.value)


def test_a_licence_may_be_added(folder: Path) -> None:
    for name in ("LICENSE", "LICENSE.md", "NOTICE"):
        (folder / name).touch()
    assert check_publishable(folder).guarantee == "dp"
    (folder / "LICENCE.sh").touch()
    with pytest.raises(InvalidArgument, match="is not known to be publishable"):
        check_publishable(folder)


def test_without_a_guarantee_the_statement_says_so(tmp_path: Path) -> None:
    folder = publish(tmp_path, not_private(), save, ledger=None, base_model="ann/base", artifact=LORA_ADAPTER)
    statement = check_publishable(folder)
    assert asdict(statement) == asdict(not_private())


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "adapter/adapter_config.json"]
)
def test_files_of_a_model_are_known(name: str) -> None:
    assert is_model_file(name)
    assert not any(is_model_file(other) for other in ("README.md", "ledger.jsonl", f"x/{name}", f"{name}.bak"))


def test_the_folder_of_a_classifier_names_its_runs(tmp_path: Path) -> None:
    for task in ("sst2", "qnli"):
        (tmp_path / task / "publish").mkdir(parents=True)
        (tmp_path / task / "publish" / "privacy_report.json").touch()
    with pytest.raises(InvalidArgument, match="holds the runs of qnli, sst2; give the folder of one of them"):
        check_publishable(tmp_path)
