"""The model card states the numbers, claims nothing more, and stays valid with any name."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml  # type: ignore[import-untyped]

from dptune.report.card import published_name, write_model_card
from dptune.report.fields import CardFields
from dptune.report.plots import plot_diagnostics
from dptune.report.statement import PrivacyStatement, write_privacy_report
from tests.dptune.report.test_prior import EARLIER
from tests.dptune.report.test_statement import not_private, private, weighted

NASTY = "/home/ann/se`cret\n---\ntitle: [x](http://evil) <img src=x> | \"'\\ $y$ {0}"


FILL_IN = "*to fill in*"


def _card(folder: Path, statement: PrivacyStatement, **kwargs: Any) -> str:
    write_model_card(folder / "README.md", statement, **{"base_model": "meta-llama/Llama-2-7b-hf", **kwargs})
    return (folder / "README.md").read_text(encoding="utf-8")


def _front_matter(card: str) -> dict[str, object]:
    opening, front, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front)


def _table(card: str) -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", card, flags=re.MULTILINE)
    return dict(rows)


def test_the_card_states_the_numbers(tmp_path: Path) -> None:
    statement = private()
    card = _card(tmp_path, statement, epsilon_plot="epsilon.png")
    assert "**ε = 2.2572 at δ = 1e-07**" in card
    assert _table(card) == {
        **{"Base model": "`meta-llama/Llama-2-7b-hf`", "Training data": FILL_IN, "Language": FILL_IN},
        **{"Licence": FILL_IN},
        "Epsilon (ε)": "2.2572",
        "Delta (δ)": "1e-07",
        "Privacy unit": statement.privacy_unit,
        "Method": statement.method,
        "Adjacency": statement.adjacency,
        "Sampler": statement.sampler,
        "Accountant": statement.accountant,
        "Noise multiplier (σ)": "1.2",
        "Clip norm (C)": "0.75",
        "Clipping": "flat",
        "Sampling probability (q)": "0.0271874",
        "Expected batch size": "2048 examples",
        "Steps": "184",
        "Training examples": "75,329",
        "Noise source": statement.noise_source,
    }
    assert "](epsilon.png)" in card
    assert f"dptune {statement.versions['dptune']}" in card


@pytest.mark.parametrize(
    ("repeated", "sentence"),
    [(1, "1 of these steps is not part of the adapter"), (1234, "1,234 of these steps are not part of the adapter")],
)
def test_repeated_steps_are_told_where_there_are_any(tmp_path: Path, repeated: int, sentence: str) -> None:
    card = _card(tmp_path, private(steps=5000, repeated_steps=repeated))
    assert f"\n{sentence}: an interruption lost" in card
    assert "ε counts every step" in card
    assert _table(card)["Steps"] == "5,000"
    card = _card(tmp_path, private(steps=5000))
    assert "of these steps" not in card
    assert "interruption" not in card


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 0.5, 2.25710001, 8.0, 19.99, 40.0, 900.0])
def test_no_figure_of_the_card_is_better_than_the_truth(tmp_path: Path, epsilon: float) -> None:
    card = _card(tmp_path, private(epsilon=epsilon))
    stated = float(_table(card)["Epsilon (ε)"])
    assert epsilon <= stated <= epsilon + 1.01e-4
    text = re.search(r"more than (e\^)?([\d.]+) times", card)
    assert text is not None
    factor = float(text[2])
    log_factor = factor if text[1] else math.log(factor)
    assert epsilon - 1e-12 <= log_factor <= epsilon + 0.01
    odds = re.search(r"right at most (e\^)?([\d.]+) times for each", card)
    assert odds is not None
    log_odds = float(odds[2]) if odds[1] else math.log(float(odds[2]))
    true = epsilon + math.log1p(1e-7 * math.exp(-epsilon)) - math.log1p(-1e-7)
    assert true - 1e-12 <= log_odds <= true + 0.01
    accuracy = (math.exp(min(epsilon, 30)) + 1e-7) / (1 + math.exp(min(epsilon, 30)))
    assert math.exp(min(true, 30)) == pytest.approx(accuracy / (1 - accuracy), rel=1e-3)


@pytest.mark.parametrize(
    ("epsilon", "verdict"), [(1.0, "strong"), (1.01, "reasonable"), (10, "reasonable"), (11, "weak")]
)
def test_the_card_says_how_strong_the_guarantee_is(tmp_path: Path, epsilon: float, verdict: str) -> None:
    assert f"This one is **{verdict}**." in _card(tmp_path, private(epsilon=epsilon))


@pytest.mark.parametrize("matter", [
    "k·ε", "Hyper-parameters", "validation", "number of training examples", "`diagnostics*`", "`all_results.json`",
    "side channels", "floating-point",
])  # fmt: skip
def test_the_card_says_what_is_not_guaranteed(tmp_path: Path, matter: str) -> None:
    _, missing, after = _card(tmp_path, private()).partition("## What is not guaranteed")
    assert missing
    assert matter in after


def test_without_a_guarantee_the_card_says_so_first_and_claims_nothing(tmp_path: Path) -> None:
    reasons = ["the noise seed was fixed by hand", "batches were shuffled | not drawn"]
    card = _card(tmp_path, not_private(reasons=reasons), epsilon_plot="epsilon.png")
    body = card.split("---\n", 2)[2].strip().splitlines()
    assert body[0].startswith("# ")
    assert body[2].startswith("> **There is no privacy guarantee.**")
    assert "> - the noise seed was fixed by hand" in body
    assert r"> - batches were shuffled \| not drawn" in body
    for claim in ("ε", "epsilon", "δ", "delta", "differential", "1e-07"):
        assert claim not in card.lower(), claim


@pytest.mark.parametrize("statement", [private(), not_private()])
def test_front_matter_is_yaml(tmp_path: Path, statement: PrivacyStatement) -> None:
    front = _front_matter(_card(tmp_path, statement))
    assert front["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert front["library_name"] == "peft"
    tags = front["tags"]
    assert isinstance(tags, list)
    assert ("differential-privacy" in tags) == (statement.guarantee == "dp")


GIVEN = CardFields("base/model", "apache-2.0", ("en", "no"), ("ann/abstracts", "our own [notes]"), "train.py --rank 4")


@pytest.mark.parametrize("statement", [private(), not_private(noise_multiplier=None)])
def test_what_the_user_says_is_in_the_card_and_what_nobody_said_is_marked(
    tmp_path: Path, statement: PrivacyStatement
) -> None:
    for fields in (GIVEN, CardFields()):
        card = _card(tmp_path, statement, base_model="base/model", fields=fields)
        (tmp_path / "for_the_hub.md").write_text(card)
        front = huggingface_hub.metadata_load(tmp_path / "for_the_hub.md")
        huggingface_hub.ModelCardData(**front)
        assert front == _front_matter(card)
        told = fields is GIVEN
        assert front.get("license") == ("apache-2.0" if told else None)
        assert front.get("language") == (["en", "no"] if told else None)
        assert front.get("datasets") == (["ann/abstracts"] if told else None)
        for name in ("license", "language", "datasets"):
            assert (f"\n# {name}: to fill in\n" in card) != told
        facts = ["ann/abstracts, our own \\[notes\\]", "en, no", "apache-2.0"] if told else [FILL_IN] * 3
        assert [_table(card)[name] for name in ("Training data", "Language", "Licence")] == facts
        assert ("## How to repeat it\n\n```\ntrain.py --rank 4\n```" in card) == told


def test_a_run_whose_guarantee_failed_is_not_to_be_repeated(tmp_path: Path) -> None:
    card = _card(tmp_path, not_private(noise_multiplier=1.0), fields=CardFields(recipe="train.py --target_epsilon 8"))
    assert "epsilon" not in card


@pytest.mark.parametrize("statement", [private(privacy_unit=NASTY), not_private(reasons=[NASTY])])
def test_names_from_the_user_break_nothing(tmp_path: Path, statement: PrivacyStatement) -> None:
    card = _card(tmp_path, statement, base_model=NASTY, title=NASTY, epsilon_plot="a](b) (c).png")
    assert set(_front_matter(card)) == {"library_name", "tags"}  # of a path, no name on the hub is known
    assert len(re.findall(r"^---$", card, flags=re.MULTILINE)) == 2
    assert re.search(r"(?<!\\)<img", card) is None
    assert re.search(r"(?<!\\)\]\(http", card) is None
    assert len(_table(card)) == 4 + (15 if statement.guarantee == "dp" else 0)
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        ast.parse(block)


def test_a_local_path_is_not_published(tmp_path: Path) -> None:
    folder = tmp_path / "a private place" / "SmolLM2-135M"
    folder.mkdir(parents=True)
    card = _card(tmp_path, private(), base_model=str(folder))
    assert "SmolLM2-135M" in card
    assert "private place" not in card
    assert tmp_path.name not in card


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt2", "gpt2"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("/data/models/llama", "llama"),
        ("/data/models/llama/", "llama"),
        ("~/llama", "llama"),
        ("./llama", "llama"),
        ("../x/llama", "llama"),
        ("C:\\Users\\ann\\llama", "llama"),
        ("/data/my llama (v2)", "my_llama__v2_"),
        ("/", "local-model"),
        ("", "local-model"),
    ],
)
def test_published_name(model: str, name: str) -> None:
    assert published_name(model) == name


def test_a_folder_named_like_a_hub_model_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ann" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert published_name("ann/llama") == "llama"
    monkeypatch.chdir(tmp_path / "ann" / "llama")
    assert published_name(".") == "llama"
    assert published_name("..") == "ann"


def test_the_code_in_the_card_names_things_that_exist(tmp_path: Path) -> None:
    card = _card(tmp_path, private())
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    trees = [ast.parse(block) for block in blocks]
    used = {
        node.attr
        for node in ast.walk(trees[0])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dptune"
    }
    assert used == {"attach_adapter"}
    assert callable(importlib.import_module("dptune").attach_adapter)


def test_nothing_measured_on_the_data_reaches_report_or_card(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 3.14159 + i, "grad_norm_p50": 2.71828, "clipped_fraction": 0.61803} for i in (1, 2)]
    (tmp_path / "diagnostics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_loss": 1.41421}))
    plot_diagnostics(tmp_path / "diagnostics.png", rows)
    write_privacy_report(tmp_path / "privacy_report.json", private())
    public = _card(tmp_path, private()) + (tmp_path / "privacy_report.json").read_text()
    for value in ("3.14", "4.14", "2.718", "0.618", "61.8", "1.414"):
        assert value not in public
    assert "diagnostics.png" not in public, "the card must not show the diagnostics"


@pytest.mark.parametrize("changes", [{"sampled": "authors"}, {"group_size": 4}])
def test_a_card_about_authors_says_what_is_counted_and_what_is_not_covered(tmp_path: Path, changes: dict) -> None:
    statement = private(
        privacy_unit="one author (all rows with the same value in column user_id)", method="M", **changes
    )
    card = _card(tmp_path, statement)
    assert "for the presence of one author (all rows with the same value in column user\\_id)" in card
    assert "**One person under several names.**" in card
    assert "**What others wrote.**" in card
    assert "Several records of one person" not in card
    assert f"**The number of training {statement.sampled}.**" in card
    table = _table(card)
    assert table["Method"] == "M"
    assert table["Expected batch size"] == f"2048 {statement.sampled}"
    assert table[f"Training {statement.sampled}"] == "75,329"


# --- what it started from, and steps that did not run ---


def test_the_card_tells_what_the_training_started_from_and_what_adds_up(tmp_path: Path) -> None:
    card = _card(tmp_path, private(starts_from=(EARLIER, replace(EARLIER, epsilon=None, declared_public=True))))
    assert "- `a`: released at ε = 2 and δ = 1e-06 for one training example." in card
    assert "- `a`: without a bound of its own; declared to be trained on public data alone." in card
    assert "The ε above is that of this training alone." in card
    assert "the bounds add up: to ε = 4.2572 at δ = 1.101e-06." in card
    assert "What it started from" not in _card(tmp_path, private())


def test_bounds_for_other_units_add_up_without_a_figure(tmp_path: Path) -> None:
    card = _card(tmp_path, private(starts_from=(replace(EARLIER, privacy_unit="one author"),)))
    assert "for one author." in card
    assert "the bounds of both add up, if it has one" in card


def test_the_card_tells_of_steps_that_did_not_run(tmp_path: Path) -> None:
    card = _card(tmp_path, private(unused_steps=16))
    assert "before the last 16 planned steps. ε counts them all the same" in card
    assert "planned steps" not in _card(tmp_path, private())


def test_the_card_tells_of_one_step_that_did_not_run(tmp_path: Path) -> None:
    assert "before the last planned step. ε counts it all the same" in _card(tmp_path, private(unused_steps=1))


@pytest.mark.parametrize("statement", [private, not_private])
def test_the_card_says_that_the_weights_are_an_average(tmp_path: Path, statement: Any) -> None:
    told = "mean of the weights after steps 3 to 9"
    assert _table(_card(tmp_path, statement(average=told)))["Released weights"] == told
    assert "Released weights" not in _card(tmp_path, statement())


def test_the_card_says_that_the_probability_is_the_largest(tmp_path: Path) -> None:
    table = _table(_card(tmp_path, weighted()))
    assert table["Largest sampling probability (q)"] == "0.0272469"
    assert "Sampling probability (q)" not in table
